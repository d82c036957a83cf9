"""The optimizer that a recipe names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from speft_ds.sparse.optim.adamw import AdamW
from speft_ds.sparse.optim.adamw_8bit import AdamW8bit
from speft_ds.sparse.optim.flat import FlatOptimizer
from speft_ds.sparse.optim.lion import Lion
from speft_ds.sparse.optim.sgd import SGD

# `optimizer.name` -> (delta, the recipe's `optimizer` section, entry_steps) -> the optimizer
MAKERS: dict[str, Callable[[nn.Parameter, object, bool], FlatOptimizer]] = {
    "adamw": lambda d, r, entry_steps: AdamW(d, r.lr, tuple(r.betas), r.eps, r.weight_decay, entry_steps),
    "adamw_8bit": lambda d, r, entry_steps: AdamW8bit(
        d, r.lr, tuple(r.betas), r.eps, r.weight_decay, entry_steps
    ),
    "paged_adamw_8bit": lambda d, r, entry_steps: AdamW8bit(
        d, r.lr, tuple(r.betas), r.eps, r.weight_decay, entry_steps, is_paged=True
    ),
    "sgd": lambda d, r, entry_steps: SGD(d, r.lr, r.momentum, r.weight_decay),
    "lion": lambda d, r, entry_steps: Lion(d, r.lr, tuple(r.betas), r.weight_decay),
}


def make_optimizer(delta: nn.Parameter, recipe, entry_steps: bool) -> FlatOptimizer:
    """The optimizer of a recipe's `optimizer` section on this rank's flat delta.

    Args:
        entry_steps: whether entries may come, go or pause; see AdamW.
    """
    return MAKERS[recipe.name](delta, recipe, entry_steps)
