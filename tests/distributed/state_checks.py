"""What runs on every rank to test that a schedule's state is all that the next step depends on."""

from __future__ import annotations

import copy

import torch

from distributed.reference import make_trainer, whole_weights
from speft_ds.schema import Recipe


def started(recipe: Recipe):
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    trainer.engine.train()
    return trainer


def check_resume(recipe: Recipe, stop: int) -> list[dict]:
    """Stopped after `stop` steps and taken up by a fresh engine over the pretrained weights: the same run."""
    whole = started(recipe)
    losses = [whole.train_step(step)["loss"] for step in range(recipe.train.steps)]
    expected = (whole_weights(whole.engine.module), copy.deepcopy(whole.schedule.state_dict()))

    first = started(recipe)
    begun = [first.train_step(step)["loss"] for step in range(stop)]
    saved = copy.deepcopy(first.schedule.state_dict())

    second = started(recipe)
    second.schedule.load_state_dict(saved)
    after = whole_weights(second.engine.module)
    for name, weight in whole_weights(first.engine.module).items():
        assert torch.equal(weight, after[name]), f"{name} differs right after loading"
    continued = [second.train_step(step)["loss"] for step in range(stop, recipe.train.steps)]

    assert begun + continued == losses, (begun + continued, losses)
    for name, weight in whole_weights(second.engine.module).items():
        assert torch.equal(weight, expected[0][name]), f"{name} differs at the end"
    compare(second.schedule.state_dict(), expected[1], "state")
    return second.schedule.changes


def compare(got, wanted, path: str) -> None:
    """Two nested states, bit for bit."""
    assert type(got) is type(wanted), path
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted), path
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), path
        for key in wanted:
            compare(got[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), path
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            compare(one, other, f"{path}[{number}]")
    elif not callable(wanted):
        assert got == wanted, path
