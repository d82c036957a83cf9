"""Optimizers on the flat delta, clipping by the true global norm, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_ds import distributed


def make_optimizer(delta: nn.Parameter, recipe) -> torch.optim.Optimizer:
    """AdamW on this rank's flat delta. Weight decay pulls delta to zero, that is, to the pretrained value.

    Args:
        delta: [num_local] fp32, the only parameter.
        recipe: the `optimizer` section of a recipe.
    """
    return torch.optim.AdamW(
        [delta], lr=recipe.lr, betas=tuple(recipe.betas), eps=recipe.eps, weight_decay=recipe.weight_decay
    )


def global_norm(gradient: Tensor) -> float:
    """L2 norm of the gradient over the entries of all ranks; each rank passes its own part."""
    squared = torch.linalg.vector_norm(gradient, dtype=torch.float64).square().reshape(1)
    return math.sqrt(distributed.all_reduce(squared).item())


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What to multiply a gradient of this norm by so that its norm is at most `clip_norm`."""
    return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


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


def make_schedule(optimizer: torch.optim.Optimizer, recipe, num_steps: int):
    """The torch scheduler that the engine steps after each optimizer step."""
    factor = lr_factor(recipe.schedule, num_steps, recipe.warmup_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
