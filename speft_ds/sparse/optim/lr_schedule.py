"""Learning-rate schedules."""

from __future__ import annotations

import math

import torch

RANGE = 1e5  # the last rate of a range test over its first


def make_lr_schedule(optimizer: torch.optim.Optimizer, recipe, num_steps: int):
    """The torch scheduler that the engine steps after each optimizer step.

    Linear warm-up, then the recipe's `optimizer.schedule` down to 0. The step after the last one would get
    0, so that every step of the run moves the weights. A range test rises exponentially to the recipe's rate.
    """

    def factor(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / (recipe.warmup_steps + 1)
        if recipe.schedule == "range_test":
            return RANGE ** (step / max(1, num_steps - 1) - 1)
        progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
        if recipe.schedule == "linear":
            return max(0.0, 1.0 - progress)
        if recipe.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
