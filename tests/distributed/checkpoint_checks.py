"""Runs in pieces: what each rank does, by a fresh engine, and what the pieces are compared by."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distributed.reference import start, whole_weights
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.training.checkpoint.folder import inspect
from speft_ds.training.checkpoint.parts import Parts
from speft_ds.training.checkpoint.random_states import restore_random_states
from speft_ds.training.checkpoint.resume import Start


def run_piece(recipe: Recipe, stop: int, checkpoint: Path | None = None) -> dict:
    """Train from a checkpoint, or from the beginning, to step `stop`, and write a checkpoint there.

    Returns:
        `ids`: the rows of each step; `losses`; `changes` of the mask; `checkpoint`: its path;
        `weights`: the path of the whole weights.
    """
    trainer = start(recipe, Start("resumed", inspect(checkpoint)) if checkpoint else None)
    if checkpoint:
        restore_random_states(trainer.checkpoint)
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
    """Right after taking up a checkpoint, the weights are those that the run had, bit for bit.

    And those whose shards a step writes to are the model's own.
    """
    trainer = start(recipe, Start("resumed", inspect(checkpoint)))
    expected = torch.load(weights)
    for name, weight in whole_weights(trainer.engine.module).items():
        assert torch.equal(weight, expected[name]), name
    own = {id(parameter) for parameter in trainer.engine.module.parameters()}
    assert own.issuperset(map(id, trainer.engine.optimizer.weights))


# In the process of the test


def assert_resumed_is_uninterrupted(ranks, recipe_of, stop: int) -> dict:
    """A run on two ranks that stops after step `stop` and goes on is the undisturbed one, bit for bit.

    Args:
        recipe_of: name of a folder -> the run's recipe with its output there.
    Returns:
        What the undisturbed run made.
    """

    def piece(folder, stop, checkpoint=None):
        return ranks(2)(run_piece, recipe=recipe_of(folder), stop=stop, checkpoint=checkpoint)[0]

    steps = recipe_of("whole").train.steps
    whole, first = piece("whole", steps), piece("first", stop)
    second = piece("second", steps, first["checkpoint"])
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["ids"] + second["ids"] == whole["ids"]
    assert second["changes"] == whole["changes"]
    assert_same(contents(second["checkpoint"]), contents(whole["checkpoint"]))
    assert_same(torch.load(second["weights"]), torch.load(whole["weights"]), "weights")
    storage = (own_storage(made["checkpoint"]) for made in (second, whole))
    for rank, (got, wanted) in enumerate(zip(*storage, strict=True)):
        assert_same(got, wanted, f"storage of rank {rank}")
    return whole


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
    for table in ("whole", "closed"):
        sizes = Counter()
        for _, counts in parts._files(table) if parts.has(table) else ():
            sizes.update(counts)
        if sizes:
            found[table] = {
                "sizes": sizes,
                **parts.shards(table, {n: (0, size) for n, size in sizes.items()}),
            }
    if "shared.statistics" in names(parts.paths[0]):
        found["statistics"] = parts.shared("statistics")
    return found


def names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def own_storage(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """What each rank's optimizer wrote for itself."""
    parts = [load_file(path) for path in sorted(checkpoint.glob("part_*.safetensors"))]
    return [{n: v for n, v in part.items() if n.startswith("own.optimizer.")} for part in parts]


def assert_same(got, wanted, path: str = "checkpoint", tolerance: float | None = None) -> None:
    """Two nested documents are equal, floats to a tolerance where there is one."""
    assert type(got) is type(wanted), path
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), path
        for key in wanted:
            assert_same(got[key], wanted[key], f"{path}.{key}", tolerance)
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), path
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{path}[{number}]", tolerance)
    elif not isinstance(wanted, torch.Tensor):
        assert got == wanted or (isinstance(wanted, float) and abs(got - wanted) < (tolerance or 0)), path
    elif tolerance is None or not wanted.is_floating_point():
        assert torch.equal(got, wanted), path
    else:
        assert got.shape == wanted.shape, path
        assert torch.allclose(got, wanted, rtol=0, atol=tolerance), (path, (got - wanted).abs().max())
