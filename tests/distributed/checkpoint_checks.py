"""What runs on every rank to test checkpoints: a run in pieces, each by a fresh engine."""

from __future__ import annotations

from pathlib import Path

import torch

from distributed.reference import whole_weights
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.training.checkpoint.folder import inspect
from speft_ds.training.checkpoint.parts import Parts
from speft_ds.training.checkpoint.resume import Start
from speft_ds.training.trainer import Trainer


def run_piece(recipe: Recipe, stop: int, checkpoint: Path | None = None) -> dict:
    """Train from a checkpoint, or from the beginning, to step `stop`, and write a checkpoint there.

    Returns:
        `ids`: the rows of each step; `losses`; `changes` of the mask; `checkpoint`: its path;
        `weights`: the path of the whole weights.
    """
    start = Start("resumed", inspect(checkpoint)) if checkpoint else None
    trainer = Trainer(recipe, start)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.choose_mask()
    trainer._restore_random_states()
    trainer.engine.train()
    ids, losses = [], []
    for step in range(trainer.first_step, stop):
        global_batch = recipe.train.global_batch
        ids.append(trainer.order.ids(step * global_batch, global_batch))
        losses.append(trainer.train_step(step)["loss"])
    trainer.writer.start(stop, trainer._snapshot(), trainer._manifest(stop, None))
    trainer.writer.finish()
    trainer.save()
    collectives.barrier()
    weights = whole_weights(trainer.engine.module)
    collectives.run_on_rank0(lambda: torch.save(weights, trainer.folder / "weights.pt"))
    return {
        "ids": ids,
        "losses": losses,
        "changes": trainer.schedule.changes,
        "checkpoint": trainer.folder / "checkpoints" / f"step_{stop:06d}",
        "weights": trainer.folder / "weights.pt",
    }


def check_takes_up_weights(recipe: Recipe, checkpoint: Path, weights: Path) -> None:
    """Right after taking up a checkpoint, the weights are those that the run had, bit for bit."""
    trainer = Trainer(recipe, Start("resumed", inspect(checkpoint)))
    trainer.choose_mask()
    expected = torch.load(weights)
    for name, weight in whole_weights(trainer.engine.module).items():
        assert torch.equal(weight, expected[name]), name


def contents(checkpoint: Path) -> dict:
    """All that a checkpoint holds, put together over its parts."""
    parts = Parts(inspect(checkpoint))
    found = {"facts": parts.facts}
    for table in ("trained", "dropped", "first", "candidates"):
        if not parts.has(table):
            continue
        index = parts.index(table)
        everything = {name: (0, 2**40) for name in index}
        found[table] = {"index": index, **parts.table(table, everything).columns}
    if "shared.statistics" in names(parts.paths[0]):
        found["statistics"] = parts.shared("statistics")
    return found


def names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())
