"""The launched scripts, from the command line to a job: all is checked before torch is imported."""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from speft_ds import env
from speft_ds.cli.launch_arguments import RANK_0_S, parse_arguments
from speft_ds.comm import signals, watchdog
from speft_ds.config.load_recipe import load_recipe, recipe_of
from speft_ds.config.recipe import Job, Recipe, resolve
from speft_ds.env import rank, world_size
from speft_ds.errors import UserError
from speft_ds.jobs.preflight import check_inputs, resolve_offline
from speft_ds.training.checkpoint import resume
from speft_ds.training.checkpoint.resume import Start, as_override
from speft_ds.training.run_dir import RECIPE, check_output_dir, wait_for_lock

EXIT_USER_ERROR = 2


def start(job: Job, manual: str) -> NoReturn:
    """Run the job on this rank, and exit; `manual` is what --help says of it."""
    env.init_env()
    if job == "train":
        signals.watch_signals()  # before anything that takes long
    code = main(job, parse_arguments(job, manual))
    sys.stdout.flush()
    # No interpreter shutdown: a rank that failed must not wait in a collective's destructor for the others.
    os._exit(code) if code else sys.exit(0)


def main(job: Job, arguments: argparse.Namespace) -> int:
    """Check, then run; returns the exit code."""
    recipe = None
    try:
        recipe, start = checked_start(job, arguments)
        if start.state == "finished":
            _print_rank0(f"the run in {start.source} is finished: there is nothing to resume")
            return 0
        use_all_cores()
        if rank() != 0 or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # the libraries' progress bars are noise elsewhere
        more = {"train": (start,), "score": (), "evaluate": (start.source,)}[job]
        importlib.import_module(f"speft_ds.jobs.{job}").run(recipe, *more)
        return 0
    except signals.Stopped as reason:
        if rank() == 0:
            hint = resume.resume_hint(Path(recipe.output_dir))
            print(f"stopped: {reason}\n{hint}", file=sys.stderr, flush=True)
        watchdog.close()
        return signals.EXIT_STOPPED
    except KeyboardInterrupt:
        return signals.EXIT_CTRL_C
    except Exception as error:
        is_bug = not isinstance(error, UserError)
        message = f"rank {rank()} failed:\n{traceback.format_exc()}" if is_bug else str(error)
        if job == "train" and recipe is not None and (is_bug or error.can_go_on):
            folder = Path(recipe.output_dir)
            if resume.last_complete(folder) is not None:
                message += f"\n{resume.resume_hint(folder)}"
        return fail(message, 1 if is_bug else EXIT_USER_ERROR)


def fail(message: str, code: int) -> int:
    """Print the message once, on the rank that failed first; returns the exit code.

    Before there is a watchdog, rank 0 prints at once, and the others only if rank 0 does not end the job with
    a message of its own.
    """
    if watchdog.fail(message):
        return code
    deadline = time.monotonic() + (RANK_0_S if rank() != 0 else 0)
    while time.monotonic() < deadline:
        if signals.stop_reason():  # the launcher ends this rank: rank 0 has printed its message and left
            return code
        time.sleep(0.1)
    print(message, file=sys.stderr, flush=True)
    return code


def checked_start(job: Job, arguments: argparse.Namespace) -> tuple[Recipe, Start]:
    """The recipe of a job and where it starts (to evaluate: the adapter), both checked. Raises UserError."""
    if job == "evaluate":
        recipe, adapter = recipe_to_evaluate(arguments)
        recipe = resolve(recipe, job=job, world_size=world_size())
        check_files(job, recipe, world_size())
        return recipe, Start(source=adapter)
    if job == "score" or arguments.resume is None:
        recipe = checked_recipe(job, arguments.recipe, arguments.overrides, world_size())
        check_output_dir(recipe)
        return recipe, Start()
    asked = resume.Resume(arguments.resume, tuple(arguments.resume_with))
    if arguments.recipe is None:
        recipe = resume.recipe_to_resume(asked, arguments.overrides)
    else:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *asked.allowed])
    recipe = resume.fit_micro_batch(recipe, world_size())
    wait_for_lock(Path(recipe.output_dir))  # a run that is just ending writes its last checkpoint
    start = resume.find_start(recipe, asked)
    if start.state == "new":
        check_output_dir(recipe)
    if start.state != "finished":
        check_files(job, recipe, world_size())
    return recipe, start


def checked_recipe(job: Job, name_or_path: str, overrides: list[str], world_size: int) -> Recipe:
    """The recipe of a job, its files checked as far as the job reads them. Raises UserError."""
    recipe = resolve(load_recipe(name_or_path, overrides), job=job, world_size=world_size)
    check_files(job, recipe, world_size)
    return recipe


def check_files(job: Job, recipe: Recipe, world_size: int) -> None:
    """Check the files of a recipe as far as the job reads them. Raises UserError."""
    if note := resolve_offline(recipe):  # before the checks, which may import the hub's libraries
        _print_rank0(note)
    check_inputs(recipe, job, world_size)


def recipe_to_evaluate(arguments: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """The recipe of a run or of a model, with the tasks to score; and the adapter. Raises UserError."""
    overrides = [*arguments.asked, *arguments.overrides]
    if arguments.run:
        folder = Path(arguments.run)
        adapter = folder / "adapter"
        if not adapter.is_dir():
            raise UserError(f"{folder} has no adapter", "--run", "name the folder of a finished run")
        recipe = load_recipe(str(folder / RECIPE), [as_override("output_dir", str(folder)), *overrides])
    else:
        adapter = Path(arguments.adapter) if arguments.adapter else None
        # zero3_cpu on GPUs, too: the others differ in the reduction of gradients.
        own = [as_override("model.name_or_path", arguments.model), "deepspeed.config=zero3_cpu"]
        if adapter is not None:
            own.append(as_override("model.dtype", _dtype_of(adapter)))
        recipe = recipe_of(f"evaluate-{Path(arguments.model).name}", [*own, *overrides])
    if not recipe.eval.tasks:
        raise UserError("no tasks to score", "--tasks", "--tasks arc_easy,hellaswag; see `lm-eval ls tasks`")
    return recipe, adapter


def _dtype_of(adapter: Path) -> str:
    try:
        return json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a readable adapter: {error}", str(adapter)) from error


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE", 1))  # set by `init_env` for every launcher
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def _print_rank0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
