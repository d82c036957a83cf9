"""Train a recipe: `deepspeed launch/train.py --recipe NAME_OR_PATH [key.sub=value ...]`.

The recipe and all that can be known from files is checked before torch is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.errors import UserError
from speft_ds.preflight import check_inputs, check_output_dir
from speft_ds.recipe import load_recipe

EXIT_USER_ERROR = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sparse fine-tuning on DeepSpeed ZeRO-3.",
        epilog="example: deepspeed --num_gpus 2 launch/train.py --recipe quickstart train.steps=20 seed=1",
    )
    parser.add_argument("--recipe", required=True, help="a name in recipes/ or the path of a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    return parser.parse_intermixed_args()


def quiet_other_bars(rank: int) -> None:
    """Progress bars of the libraries show on rank 0's terminal only; elsewhere they are noise."""
    if rank != 0 or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def main() -> int:
    arguments = parse_arguments()
    rank = int(os.environ.get("RANK", "0"))
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        check_inputs(recipe, int(os.environ.get("WORLD_SIZE", "1")))
        if rank == 0:  # the others would see what rank 0 is already writing
            check_output_dir(recipe)
        use_all_cores()
        quiet_other_bars(rank)
        from speft_ds.train import run

        run(recipe)
        return 0
    except UserError as error:
        return fail(rank, str(error), EXIT_USER_ERROR)
    except Exception:
        return fail(rank, f"rank {rank} failed:\n{traceback.format_exc()}", 1)


def fail(rank: int, message: str, code: int) -> int:
    """Print once: rank 0 at once; the others only if rank 0 (whose exit ends the job) has nothing to say."""
    if rank != 0:
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # No interpreter shutdown: a rank that failed must not wait in a collective's destructor for the others.
    os._exit(code) if code else sys.exit(0)
