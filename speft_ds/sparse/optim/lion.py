"""Lion on the flat delta."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speft_ds.sparse.optim.flat import FlatOptimizer


class Lion(FlatOptimizer):
    """Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023), its algorithm 2.

    A step is the sign of the gradient mixed with its average, so all entries that move go equally far.

    Args:
        delta: [num_local] fp32.
        betas: of the mix whose sign is taken, and of the average that is kept.
    """

    def __init__(self, delta: nn.Parameter, lr: float, betas, weight_decay: float):
        state = {"exp_avg": torch.zeros_like(delta, requires_grad=False)}
        super().__init__(delta, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, state)

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        delta.sub_(state["exp_avg"].lerp(gradient, 1 - beta1).sign_(), alpha=group["lr"])
        state["exp_avg"].lerp_(gradient, 1 - beta2)
