"""AdamW on the flat delta."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speft_ds.sparse.optim.flat import FlatOptimizer


class AdamW(FlatOptimizer):
    """AdamW (Loshchilov & Hutter, 2019).

    Bias correction goes by an entry's own entry_step, the number of steps that it has taken; so a young entry
    among old ones takes the steps that it would take alone.

    Args:
        delta: [num_local] fp32.
        entry_steps: keep an entry_step for every entry (4 bytes each), for a mask that changes or entries that pause;
            otherwise all entries share one.
    """

    def __init__(
        self, delta: nn.Parameter, lr: float, betas, eps: float, weight_decay: float, entry_steps: bool
    ):
        zeros = torch.zeros_like(delta, requires_grad=False)
        state = {
            "exp_avg": zeros,
            "exp_avg_sq": zeros.clone(),
            "entry_step": zero_entry_step(delta, entry_steps),
        }
        super().__init__(delta, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, state)

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        entry_step = state["entry_step"].add_(1)
        advance_adamw(delta, gradient, state["exp_avg"], state["exp_avg_sq"], entry_step, group)


def zero_entry_step(delta: Tensor, entry_steps: bool) -> Tensor:
    """int32 zeros: an entry_step of each entry, or one of all."""
    return torch.zeros(delta.shape if entry_steps else (), dtype=torch.int32, device=delta.device)


def advance_adamw(
    delta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, entry_step: Tensor, group: dict
) -> None:
    """AdamW's update, in place on `delta`, `exp_avg` and `exp_avg_sq` [n] fp32.

    Args:
        entry_step: [n] or scalar int32: steps taken, this one included.
        group: lr, betas, eps, weight_decay.
    """
    beta1, beta2 = group["betas"]
    delta.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq / _correction(beta2, entry_step)).sqrt_().add_(group["eps"])
    delta.sub_(exp_avg / _correction(beta1, entry_step) / denominator * group["lr"])


def _correction(beta: float, entry_step: Tensor) -> Tensor:
    """1 - beta^entry_step, computed in fp64 once for every entry_step that occurs; fp32, shaped like `entry_step`."""
    oldest = int(entry_step.max()) if entry_step.numel() else 0
    powers = beta ** torch.arange(oldest + 1, dtype=torch.float64, device=entry_step.device)
    return (1 - powers).to(torch.float32)[entry_step.to(torch.int64)]
