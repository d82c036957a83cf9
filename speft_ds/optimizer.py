"""The optimizer on the flat delta, clipping by the true global norm, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_ds import distributed


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) on one flat delta whose entries may come, go and pause.

    Bias correction goes by an entry's own age, the number of steps that it has taken; so a young entry
    among old ones takes the steps that it would take alone. Weight decay pulls delta to zero, that is, to
    the pretrained value.

    Args:
        delta: [num_local] fp32.
        ages: keep an age for every entry (4 bytes each), for a mask that changes or entries that pause;
            otherwise all entries share one.
    """

    def __init__(self, delta: nn.Parameter, lr: float, betas, eps: float, weight_decay: float, ages: bool):
        super().__init__([delta], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        age = torch.zeros(delta.shape if ages else (), dtype=torch.int32, device=delta.device)
        zeros = torch.zeros_like(delta, requires_grad=False)
        self.state[delta] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "age": age}

    @torch.no_grad()
    def step(self, closure=None, active: Tensor | None = None) -> None:
        """One step of all entries, or of those where the [num_local] bool `active` is True.

        The others keep delta, moments and age. `active` needs `ages`.
        """
        group = self.param_groups[0]
        (delta,) = group["params"]
        state, gradient = self.state[delta], delta.grad
        if active is None:
            self._advance(delta, gradient, state, group)
            return
        if state["age"].dim() == 0:
            raise ValueError("entries that pause need ages")
        chosen = active.nonzero()[:, 0]
        own = {name: value[chosen] for name, value in state.items()}
        values = delta[chosen]
        self._advance(values, gradient[chosen], own, group)
        delta[chosen] = values
        for name, value in own.items():
            state[name][chosen] = value

    @staticmethod
    def _advance(delta: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict) -> None:
        """The update, in place on all arguments."""
        beta1, beta2 = group["betas"]
        delta.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        age = state["age"].add_(1)
        denominator = (state["exp_avg_sq"] / _correction(beta2, age)).sqrt_().add_(group["eps"])
        delta.sub_(state["exp_avg"] / _correction(beta1, age) / denominator * group["lr"])

    @torch.no_grad()
    def carry(self, delta: nn.Parameter, position: Tensor, found: Tensor) -> None:
        """Go on with another delta, of a new mask.

        Args:
            position: [len(delta)] where each of its entries stood in the old delta, where `found`;
                the others start with zero moments and age.
        """
        (old,) = self.param_groups[0]["params"]
        state = self.state.pop(old)
        moved = {}
        for name, value in state.items():
            if value.dim() == 0:
                raise ValueError("a mask that changes needs ages")
            moved[name] = value.new_zeros(delta.shape)
            moved[name][found] = value[position[found]]
        self.param_groups[0]["params"] = [delta]
        self.state[delta] = moved

    def restore(self, delta: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Go on with a delta and its saved state, exp_avg, exp_avg_sq and age."""
        self.state.clear()
        self.param_groups[0]["params"] = [delta]
        self.state[delta] = {name: value.to(delta.device, copy=True) for name, value in state.items()}


def _correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age, computed in fp64 once for every age that occurs; fp32, shaped like `age`."""
    oldest = int(age.max()) if age.numel() else 0
    powers = beta ** torch.arange(oldest + 1, dtype=torch.float64, device=age.device)
    return (1 - powers).to(torch.float32)[age.to(torch.int64)]


def make_optimizer(delta: nn.Parameter, recipe, ages: bool) -> AdamW:
    """The optimizer of a recipe's `optimizer` section on this rank's flat delta; `ages` as for AdamW."""
    return AdamW(delta, recipe.lr, tuple(recipe.betas), recipe.eps, recipe.weight_decay, ages)


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


def make_lr_schedule(optimizer: torch.optim.Optimizer, recipe, num_steps: int):
    """The torch scheduler that the engine steps after each optimizer step."""
    factor = lr_factor(recipe.schedule, num_steps, recipe.warmup_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
