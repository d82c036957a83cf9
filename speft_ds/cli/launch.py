"""From a launcher's command line to a run: the recipe and its files are checked before torch is imported."""

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
from speft_ds.cli.arguments import RANK_0_S, Job, parse_arguments
from speft_ds.comm import signals, watchdog
from speft_ds.config.load_recipe import load_recipe, recipe_of
from speft_ds.config.recipe import Recipe, resolve
from speft_ds.env import rank, world_size
from speft_ds.errors import UserError
from speft_ds.jobs.preflight import check_inputs, resolve_offline
from speft_ds.training.checkpoint.resume import (
    Resume,
    Start,
    as_override,
    find_start,
    fit_micro_batch,
    last_whole,
    recipe_to_resume,
    resume_hint,
)
from speft_ds.training.run_dir import RECIPE, check_output_dir, wait_for_lock

EXIT_USER_ERROR = 2


def start(job: Job, manual: str) -> NoReturn:
    """Do the job on this rank, as the command line says, and exit; `manual` is what --help says of it."""
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
            if rank() == 0:
                print(f"the run in {start.source} is finished: there is nothing to resume", flush=True)
            return 0
        use_all_cores()
        quiet_other_bars()
        more = {"train": (start,), "score": (), "evaluate": (start.source,)}[job]
        importlib.import_module(f"speft_ds.jobs.{job}").run(recipe, *more)
        return 0
    except UserError as error:
        can_go_on = job == "train" and error.can_go_on
        return fail(_with_way_on(str(error), recipe if can_go_on else None), EXIT_USER_ERROR)
    except signals.Stopped as reason:
        if rank() == 0:
            print(f"stopped: {reason}\n{resume_hint(Path(recipe.output_dir))}", file=sys.stderr, flush=True)
        watchdog.close()
        return signals.EXIT_STOPPED
    except KeyboardInterrupt:
        return signals.EXIT_CTRL_C
    except Exception:
        message = f"rank {rank()} failed:\n{traceback.format_exc()}"
        return fail(_with_way_on(message, recipe if job == "train" else None), 1)


def _with_way_on(message: str, recipe: Recipe | None) -> str:
    """A message, and what to go on from where there is something."""
    has_checkpoint = recipe is not None and last_whole(Path(recipe.output_dir)) is not None
    return f"{message}\n{resume_hint(Path(recipe.output_dir))}" if has_checkpoint else message


def checked_start(job: Job, arguments: argparse.Namespace) -> tuple[Recipe, Start]:
    """The recipe of a job and where it starts, both checked. Raises UserError."""
    if job == "evaluate":
        recipe, adapter = recipe_to_evaluate(arguments)
        recipe = resolve(recipe, job=job, world_size=world_size())
        check_files(job, recipe, world_size())
        return recipe, Start(source=adapter)
    asked = getattr(arguments, "resume", None)
    if asked is None:
        recipe = checked_recipe(job, arguments.recipe, arguments.overrides, world_size())
        check_output_dir(recipe)
        return recipe, Start()
    resume = Resume(asked, tuple(arguments.resume_with))
    if arguments.recipe is None:
        recipe = recipe_to_resume(resume, arguments.overrides)
    else:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *resume.allowed])
    recipe = fit_micro_batch(recipe, world_size())
    wait_for_lock(Path(recipe.output_dir))  # a run that is just ending writes its last checkpoint
    start = find_start(recipe, resume)
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


def recipe_to_evaluate(arguments: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """What to score, with the tasks that the command line asks for, and the adapter. Raises UserError."""
    asked = {"limit": arguments.limit, "num_fewshot": arguments.num_fewshot}
    overrides = [f"eval.{key}={value}" for key, value in asked.items() if value is not None]
    if arguments.tasks:
        overrides.append(f"eval.tasks=[{arguments.tasks}]")
    if arguments.run:
        folder = Path(arguments.run)
        adapter = folder / "adapter"
        if not adapter.is_dir():
            fix = "name a run folder whose run has come to its end"
            raise UserError(f"{folder} has no adapter", "--run", fix)
        own = as_override("output_dir", str(folder))
        recipe = load_recipe(str(folder / RECIPE), [own, *overrides, *arguments.overrides])
    else:
        adapter = Path(arguments.adapter) if arguments.adapter else None
        recipe = recipe_of(*_of_model(arguments.model, adapter, [*overrides, *arguments.overrides]))
    if not recipe.eval.tasks:
        raise UserError("no tasks to score", "--tasks", "--tasks arc_easy,hellaswag; see `lm-eval ls tasks`")
    return recipe, adapter


def _of_model(model: str, adapter: Path | None, overrides: list[str]) -> tuple[str, list[str]]:
    """Name and keys of a recipe that scores a model; an adapter says in which dtype."""
    own = [as_override("model.name_or_path", model)]
    if adapter is not None:
        try:
            facts = json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))
            own.append(as_override("model.dtype", facts["dtype"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a readable adapter: {error}", str(adapter)) from error
    own.append("deepspeed.config=zero3_cpu")  # on GPUs, too: what differs is the exchange of gradients
    return f"evaluate-{Path(model).name}", [*own, *overrides]


def check_files(job: Job, recipe: Recipe, world_size: int) -> None:
    """Check the files of a recipe as far as the job reads them. Raises UserError."""
    note = resolve_offline(recipe)  # before the checks, which may import the hub's libraries
    if note and rank() == 0:
        print(note, flush=True)
    check_inputs(recipe, job, world_size)


def quiet_other_bars() -> None:
    """Progress bars of the libraries show on rank 0's terminal only; elsewhere they are noise."""
    if rank() != 0 or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE", 1))  # `rendezvous.settle` knows it of every launcher
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def fail(message: str, code: int) -> int:
    """Print once, on the rank that failed first.

    Before the ranks know each other: rank 0 at once, the others only if rank 0 (whose exit ends the job) has
    nothing to say.
    """
    if watchdog.fail(message):
        return code
    deadline = time.monotonic() + (RANK_0_S if rank() != 0 else 0)
    while time.monotonic() < deadline:
        if signals.stop_reason():  # the launcher ends this rank, since rank 0 has told and left
            return code
        time.sleep(0.1)
    print(message, file=sys.stderr, flush=True)
    return code
