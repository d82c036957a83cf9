"""A run from recipe to report: base, scores before, mask, training, checkpoints, adapter, scores after."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from speft_ds.adapter.card import write_card
from speft_ds.comm import collectives, watchdog
from speft_ds.comm.collectives import log_rank0
from speft_ds.config.recipe import Recipe
from speft_ds.env import versions
from speft_ds.errors import UserError
from speft_ds.evaluation.scores import card_scores
from speft_ds.model.dtype import agree_on_dtype
from speft_ds.report.page import write_report
from speft_ds.report.summary import print_summary
from speft_ds.training.checkpoint.folder import Checkpoint, clean, latest_valid, list_checkpoints, verify
from speft_ds.training.checkpoint.resume import Start, resume_hint
from speft_ds.training.checks import check_space
from speft_ds.training.metrics import tokens_per_second
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
from speft_ds.training.trainer import Trainer


def run(recipe: Recipe, start: Start | None = None) -> None:
    """The job, on every rank. Rank 0 writes the run folder and prints the table.

    Args:
        start: where the run starts, as rank 0 sees it; None: at the beginning.
    Raises:
        UserError: anything that the user can fix; the same on every rank.
        Stopped: a rank was asked to stop, and what was reached is in a checkpoint; the same on every rank.
    """
    began = time.perf_counter()
    collectives.init(recipe.train.timeout_minutes + 1)
    folder = Path(recipe.output_dir)
    collectives.start_watchdog(recipe.train.timeout_minutes, lambda: resume_hint(folder))
    start = verified_start(collectives.broadcast_object(start or Start()))
    recipe = agree_on_dtype(recipe, start.dtype)
    if start.state == "new":
        collectives.run_on_rank0(lambda: check_output_dir(recipe))
    trainer = Trainer(recipe, start)
    num_ranks = collectives.world_size()
    log_rank0(f"{recipe.name}: {len(trainer.rows):,} rows, {trainer.num_steps} steps, {num_ranks} rank(s)")
    opened: list[Lock] = []  # by rank 0, for as long as the process lives
    collectives.run_on_rank0(lambda: opened.append(open_folder(recipe, start)))
    trainer.run_id = collectives.broadcast_object(read_facts(folder).get("run_id"))
    check_space(trainer.context, trainer.num_steps)

    if start.checkpoint is None:
        trainer.evaluate("before")
    collectives.raise_if_stop_requested()
    trainer.choose_mask()
    if start.checkpoint is not None:
        trainer.evaluate("before")  # says what is missing: the weights are not the base's any more
    collectives.raise_if_stop_requested()
    trainer.train()
    trainer.save()
    trainer.evaluate("after")
    trainer.timings["total"] = time.perf_counter() - began

    def finish() -> None:
        facts = {**read_facts(folder), **trainer.facts(), "finished": True}
        write_facts(folder, {**facts, "tokens_per_s": tokens_per_second(folder / "metrics.jsonl")})
        write_card(folder / "adapter", card_scores(folder))
        write_report(folder)
        print_summary(folder)

    collectives.run_on_rank0(finish)
    collectives.barrier()
    watchdog.close()


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
        found: list[Checkpoint | None] = []

        def older(start: Start = start, found: list = found) -> None:
            run_id = start.checkpoint.manifest["run_id"]
            found.append(latest_valid(start.source, run_id, log_rank0, below=start.checkpoint.step))

        collectives.run_on_rank0(older)
        start = replace(start, checkpoint=collectives.broadcast_object(found[0] if found else None))
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
