"""A run from recipe to report: base, scores before, mask, training, checkpoints, adapter, scores after."""

from __future__ import annotations

import time
from pathlib import Path

from speft_ds.adapter.card import write_card
from speft_ds.comm import collectives, watchdog
from speft_ds.config.recipe import Recipe
from speft_ds.data.row_counts import in_words
from speft_ds.env import log_rank0
from speft_ds.evaluation.scores import card_scores
from speft_ds.model.dtype import agree_on_dtype
from speft_ds.report.page import write_report
from speft_ds.report.summary import print_summary
from speft_ds.training.checkpoint.resume import Start, open_folder, resume_hint, verified_start
from speft_ds.training.checks import check_space
from speft_ds.training.run_data import agree_on_date
from speft_ds.training.run_dir import check_output_dir, read_facts, run_facts, write_facts
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
    recipe = agree_on_date(agree_on_dtype(recipe, start.dtype), start.date)
    if start.state == "new":
        collectives.run_on_rank0(lambda: check_output_dir(recipe))
    starting = time.perf_counter() - began
    trainer = Trainer(recipe, start)
    trainer.timings["start"] = starting
    num_ranks = collectives.world_size()
    log_rank0(f"{recipe.name}: {len(trainer.rows):,} rows, {trainer.num_steps} steps, {num_ranks} rank(s)")
    hint = "; speft data --left-out names those left out" if trainer.row_counts["left_out"] else ""
    log_rank0(in_words(trainer.row_counts) + hint)
    with trainer.timings.stage("start"):
        lock = collectives.run_on_rank0(lambda: open_folder(recipe, start))  # noqa: F841 - held by rank 0
        trainer.run_id = collectives.broadcast_object(read_facts(folder).get("run_id"))
        check_space(trainer.context, trainer.num_steps)

    if start.checkpoint is None:
        trainer.evaluate("before")
    collectives.raise_if_stop_requested()
    trainer.choose_mask()
    collectives.run_on_rank0(
        lambda: write_facts(folder, {**read_facts(folder), "mask": trainer.mask.facts()})
    )
    if start.checkpoint is not None:
        trainer.evaluate("before")  # says what is missing: the weights are not the base's any more
    collectives.raise_if_stop_requested()
    trainer.train()
    trainer.save()
    trainer.evaluate("after")
    trainer.timings["total"] = time.perf_counter() - began

    def finish() -> None:
        write_facts(folder, {**read_facts(folder), **run_facts(trainer), "finished": True})
        write_card(folder / "adapter", card_scores(folder))
        write_report(folder)
        print_summary(folder)

    collectives.run_on_rank0(finish)
    collectives.barrier()
    watchdog.close()
