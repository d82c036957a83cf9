"""What runs on the ranks to compare a plan with: gathers counted inside DeepSpeed, buffers as allocated."""

from __future__ import annotations

from unittest import mock

from distributed.reference import make_trainer
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.plan.gathers import BACKWARD, FORWARD, RECOMPUTE
from speft_ds.training import memory


def check_gathers(recipe: Recipe) -> dict:
    """Gathers of one step of one micro-batch, once DeepSpeed knows the order of the modules."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    trainer.engine.train()
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    gathers = trainer.engine.gathers
    return {
        "traffic": {kind: gathers.elements[kind] for kind in (FORWARD, RECOMPUTE, BACKWARD)},
        "most": gathers.most_whole // 4,
    }


def check_memory(recipe: Recipe) -> dict[str, int]:
    """Peak bytes of this process while it scores and while it trains; a fresh process measures best."""
    trainer = make_trainer(recipe)
    memory.restart()
    trainer.choose_mask()
    scoring = memory.peak()
    memory.restart()
    trainer.engine.train()
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    return {"scoring": scoring, "training": memory.peak()}


PEAK = 2**50  # more than any rank takes


def check_account(recipe: Recipe) -> dict:
    """What this rank counts of itself after a few steps, were PEAK its peak, and how many entries it has."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    with mock.patch.object(memory, "peak", lambda: PEAK):
        trainer.train()
    return {**trainer.accounts[collectives.rank()], "own": trainer.state.num_local}
