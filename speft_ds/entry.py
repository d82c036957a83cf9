"""From a launcher's command line to a run: the recipe and its files are checked before torch is imported."""

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
import traceback
from typing import Literal, NoReturn

from speft_ds.errors import UserError
from speft_ds.preflight import check_inputs, check_output_dir, settle_hub
from speft_ds.recipe import for_scoring, load_recipe
from speft_ds.schema import Recipe

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 130
RANK_0_S = 3  # that the other ranks wait, so that rank 0 has said what is wrong when they exit
Job = Literal["train", "score"]  # the module of speft_ds whose `run(recipe)` does it

MORE_HELP = """\
where to look things up:
  speft ls                  the recipes
  speft schema mask         the keys of a section, or without it all: types, defaults, meaning
  speft show quickstart     a recipe with every value, and where each comes from

exit codes:
  0    done
  1    it failed inside: the traceback says where
  2    something that you can mend: the message says what, where, and what to type
  130  Ctrl-C
"""


def start(job: Job, manual: str) -> NoReturn:
    """Do the job on this rank, as the command line says, and exit; `manual` is what --help says of it."""
    code = main(job, parse_arguments(manual))
    sys.stdout.flush()
    # No interpreter shutdown: a rank that failed must not wait in a collective's destructor for the others.
    os._exit(code) if code else sys.exit(0)


def parse_arguments(manual: str) -> argparse.Namespace:
    """The command line of this rank. Every rank has the same, so only rank 0 prints help and usage errors."""
    parser = argparse.ArgumentParser(
        usage="deepspeed [launcher options] launch/%(prog)s --recipe RECIPE [KEY=VALUE ...]",
        description=manual,
        epilog=MORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a name (`speft ls`) or the path of a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    if rank() == 0:
        return parser.parse_intermixed_args()
    unseen = io.StringIO()
    try:
        with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            return parser.parse_intermixed_args()
    except SystemExit as ended:
        if ended.code:
            time.sleep(RANK_0_S)
        raise


def rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def main(job: Job, arguments: argparse.Namespace) -> int:
    """Check, then run; returns the exit code."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = checked_recipe(job, arguments.recipe, arguments.overrides, world_size)
        if rank() == 0:  # the others would see what rank 0 is already writing
            check_output_dir(recipe)
        use_all_cores()
        quiet_other_bars()
        importlib.import_module(f"speft_ds.{job}").run(recipe)
        return 0
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return EXIT_CTRL_C
    except Exception:
        return fail(f"rank {rank()} failed:\n{traceback.format_exc()}", 1)


def checked_recipe(job: Job, name_or_path: str, overrides: list[str], world_size: int) -> Recipe:
    """The recipe of a job, its files checked as far as the job reads them. Raises UserError."""
    recipe = load_recipe(name_or_path, overrides)
    note = settle_hub(recipe)  # before the checks, which may import the hub's libraries
    if note and rank() == 0:
        print(note, flush=True)
    if job == "score":
        recipe = for_scoring(recipe)
    check_inputs(recipe, world_size, needs_training_rows=job == "train")
    return recipe


def quiet_other_bars() -> None:
    """Progress bars of the libraries show on rank 0's terminal only; elsewhere they are noise."""
    if rank() != 0 or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def fail(message: str, code: int) -> int:
    """Print once: rank 0 at once; the others only if rank 0 (whose exit ends the job) has nothing to say."""
    if rank() != 0:
        time.sleep(RANK_0_S)
    print(message, file=sys.stderr, flush=True)
    return code
