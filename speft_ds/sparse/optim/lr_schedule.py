"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def lr_factor(schedule: str, num_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> multiple of the learning rate: linear warm-up, then `schedule` down to 0.

    The step after the last one would get 0, so that every step of the run moves the weights.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        if schedule == "linear":
            return max(0.0, 1.0 - progress)
        if schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return factor


def make_lr_schedule(optimizer: torch.optim.Optimizer, recipe, num_steps: int):
    """The torch scheduler that the engine steps after each optimizer step."""
    factor = lr_factor(recipe.schedule, num_steps, recipe.warmup_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
