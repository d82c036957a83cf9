"""What runs on the ranks to compare a plan with: gathers counted inside DeepSpeed, buffers as allocated."""

from __future__ import annotations

from distributed.gather_counter import GatherCounter
from distributed.reference import make_trainer
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.tools.plan.gathered_weights import BACKWARD, FORWARD, RECOMPUTE
from speft_ds.training import memory


def check_run(recipe: Recipe) -> dict:
    """A run, what it says of its own resources, and what this rank gathered and sent in the last step.

    By then DeepSpeed knows the order of the modules.
    """
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    gathers, reduced = GatherCounter(trainer.engine), []
    train_step, reduce_scatter = trainer.train_step, collectives.start_reduce_scatter

    def counted_step(step: int) -> dict:
        gathers.restart()
        reduced.clear()
        return train_step(step)

    def counted_reduce(pieces):
        reduced.append(pieces.nbytes * (collectives.world_size() - 1) // collectives.world_size())
        return reduce_scatter(pieces)

    trainer.train_step, collectives.start_reduce_scatter = counted_step, counted_reduce
    try:
        trainer.train()
    finally:
        collectives.start_reduce_scatter = reduce_scatter
    return {
        **trainer.resources[collectives.rank()],
        "num_own": trainer.state.num_local,
        "gathered": {kind: gathers.elements[kind] for kind in (FORWARD, RECOMPUTE, BACKWARD)},
        "most_gathered": gathers.most_gathered,
        "sent": {f"weights, {kind}": count for kind, count in gathers.sent.items()},
        "reduced": sum(reduced),
    }


def check_memory(recipe: Recipe) -> dict[str, int]:
    """Peak bytes of this process while it scores and while it trains; a fresh process measures best."""
    trainer = make_trainer(recipe)
    memory.reset_peak()
    trainer.choose_mask()
    scoring = memory.peak_bytes()
    memory.reset_peak()
    trainer.engine.train()
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    return {"scoring": scoring, "training": memory.peak_bytes()}
