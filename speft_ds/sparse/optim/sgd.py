"""Stochastic gradient descent on the flat delta."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speft_ds.sparse.optim.flat import FlatOptimizer


class SGD(FlatOptimizer):
    """Gradient descent with heavy-ball momentum (Polyak, 1964), as `torch.optim.SGD` without dampening.

    Weight decay is decoupled (SGDW; Loshchilov & Hutter, 2019); torch's goes through the momentum.

    Args:
        delta: [num_local] fp32.
        momentum: 0: none, and no state.
    """

    def __init__(self, delta: nn.Parameter, lr: float, momentum: float, weight_decay: float):
        state = {"momentum": torch.zeros_like(delta, requires_grad=False)} if momentum else {}
        super().__init__(delta, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, state)

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        if group["momentum"]:
            gradient = state["momentum"].mul_(group["momentum"]).add_(gradient)
        delta.sub_(gradient, alpha=group["lr"])
