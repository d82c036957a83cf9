"""Start of a run: the checkpoint that it continues, and its folder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0, versions
from speft_ds.errors import UserError
from speft_ds.training.checkpoint.folder import clean, latest_valid, list_checkpoints, verify
from speft_ds.training.checkpoint.resume import Start
from speft_ds.training.run_dir import (
    Lock,
    check_output_dir,
    copy_scores,
    new_run_id,
    read_facts,
    rewind_metrics,
    start_folder,
    write_facts,
)


def verified_start(start: Start) -> Start:
    """The start with a checkpoint whose parts are what was written: the ranks read all of them.

    A damaged one is said so, and the next older one is taken, unless the user named it.

    Raises:
        UserError: on every rank, where there is no complete one.
    """
    while start.checkpoint is not None:
        own = verify(start.checkpoint, collectives.rank(), collectives.world_size())
        problems = [problem for problem in collectives.all_gather_objects(own) if problem]
        if not problems:
            return start
        if start.is_chosen:
            fix = f"take the newest complete one: --resume {start.source}"
            raise UserError(f"cannot resume: {problems[0]}", str(start.checkpoint.path), fix)
        log_rank0(f"note: checkpoint {start.checkpoint.path}: {problems[0]}; looking for an older one")
        run_id, step = start.checkpoint.manifest["run_id"], start.checkpoint.step
        older = collectives.run_on_rank0(partial(latest_valid, start.source, run_id, log_rank0, below=step))
        start = replace(start, checkpoint=collectives.broadcast_object(older))
    return start


def check_still_newest(folder: Path, step: int) -> None:
    """Refuse to set back a run that another job took on while this one was starting. Raises UserError."""
    later = [c for c in list_checkpoints(folder) if c.step > step and c.problem is None and verify(c) is None]
    if later:
        what = f"another job has taken the run on to {later[0].path} while this one was starting"
        raise UserError(what, str(folder), "the same command once more")


def open_folder(recipe: Recipe, start: Start) -> Lock:
    """Make the run folder ours, and what is in it what a run has at this step. On rank 0."""
    folder = Path(recipe.output_dir)
    lock = Lock(folder)
    if start.state == "new":
        check_output_dir(recipe)
    forked = start.source is not None and start.source.absolute() != folder.absolute()
    step = start.checkpoint.step if start.checkpoint else 0
    if not start.is_chosen and not forked and start.state == "resumed":
        check_still_newest(folder, step)
    clean(folder, step, log_rank0)
    if start.state == "resumed":
        rewind_metrics(folder, step, start.source)
    if forked:
        copy_scores(start.source, folder)
    start_folder(recipe)
    before = {} if forked else read_facts(folder)
    starts = [*before.get("starts", []), {"step": step, "world_size": collectives.world_size()}]
    own_id = start.checkpoint.manifest["run_id"] if start.checkpoint and not forked else new_run_id()
    run_id = before.get("run_id") or own_id
    write_facts(folder, {"run_id": run_id, "finished": False, "starts": starts, "versions": versions()})
    return lock
