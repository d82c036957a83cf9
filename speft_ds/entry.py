"""From a launcher's command line to a run: the recipe and its files are checked before torch is imported."""

import argparse
import importlib
import os
import sys
import time
import traceback
from typing import Literal, NoReturn

from speft_ds.errors import UserError
from speft_ds.preflight import check_inputs, check_output_dir
from speft_ds.recipe import for_scoring, load_recipe
from speft_ds.schema import Recipe

EXIT_USER_ERROR = 2
Job = Literal["train", "score"]  # the module of speft_ds whose `run(recipe)` does it


def start(job: Job, description: str) -> NoReturn:
    """Do the job on this rank, as the command line says, and exit."""
    code = main(job, parse_arguments(job, description))
    sys.stdout.flush()
    # No interpreter shutdown: a rank that failed must not wait in a collective's destructor for the others.
    os._exit(code) if code else sys.exit(0)


def parse_arguments(job: Job, description: str) -> argparse.Namespace:
    example = f"example: deepspeed --num_gpus 2 launch/{job}.py --recipe quickstart mask.density=0.01 seed=1"
    parser = argparse.ArgumentParser(description=description, epilog=example)
    parser.add_argument("--recipe", required=True, help="a name in recipes/ or the path of a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="recipe keys to change")
    return parser.parse_intermixed_args()


def main(job: Job, arguments: argparse.Namespace) -> int:
    """Check, then run; returns the exit code."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = checked_recipe(job, arguments.recipe, arguments.overrides, world_size)
        if rank == 0:  # the others would see what rank 0 is already writing
            check_output_dir(recipe)
        use_all_cores()
        quiet_other_bars(rank)
        importlib.import_module(f"speft_ds.{job}").run(recipe)
        return 0
    except UserError as error:
        return fail(rank, str(error), EXIT_USER_ERROR)
    except Exception:
        return fail(rank, f"rank {rank} failed:\n{traceback.format_exc()}", 1)


def checked_recipe(job: Job, name_or_path: str, overrides: list[str], world_size: int) -> Recipe:
    """The recipe of a job, its files checked as far as the job reads them. Raises UserError."""
    recipe = load_recipe(name_or_path, overrides)
    if job == "score":
        recipe = for_scoring(recipe)
    check_inputs(recipe, world_size, needs_training_rows=job == "train")
    return recipe


def quiet_other_bars(rank: int) -> None:
    """Progress bars of the libraries show on rank 0's terminal only; elsewhere they are noise."""
    if rank != 0 or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def fail(rank: int, message: str, code: int) -> int:
    """Print once: rank 0 at once; the others only if rank 0 (whose exit ends the job) has nothing to say."""
    if rank != 0:
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)
    return code
