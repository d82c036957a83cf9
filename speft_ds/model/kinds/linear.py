"""`nn.Linear`: [out, in]. A frozen weight and a hook for the gradient of some of its entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds.model.input_recompute import LayerInput
from speft_ds.model.weight_grad_hooks import WeightGradHook


def find(module: nn.Module) -> list[str]:
    return ["weight"] if type(module) in (nn.Linear, AdaptedLinear) else []


class _LinearWithHook(torch.autograd.Function):
    """A frozen linear that hands (x, grad_y) of its backward to a hook.

    Saves the leaf parameters that the weight is made of: ZeRO-3 frees their data after the forward and
    gathers it again before this module's backward. A view (as `F.linear` saves) would keep the gathered
    weight alive in between.
    """

    @staticmethod
    def forward(ctx, x, grad_anchor, bias, hook, layer_input, make_weight, *stored):
        saved = [] if layer_input is None else layer_input.to_save(x, getattr(hook, "columns", None))
        ctx.save_for_backward(*stored, *saved)
        ctx.hook, ctx.layer_input = hook, layer_input
        ctx.make_weight, ctx.num_stored = make_weight, len(stored)
        return F.linear(x, make_weight(*stored), bias)

    @staticmethod
    def backward(ctx, grad_y):
        kept = ctx.saved_tensors  # asked for once, all that checkpointing allows
        stored, saved = kept[: ctx.num_stored], kept[ctx.num_stored :]
        if ctx.layer_input is not None:
            ctx.hook(ctx.layer_input.value(saved), grad_y)
        grad_x = grad_y.matmul(ctx.make_weight(*stored)) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return (grad_x, None, grad_bias, *[None] * (3 + ctx.num_stored))


def linear_with_hook(
    module: nn.Module, x: Tensor, make_weight: Callable[..., Tensor], stored: tuple[Tensor, ...]
) -> Tensor:
    """The product of an adapted module, which calls its hook in the backward, if it has one.

    Args:
        make_weight: [out, in] of what is stored, for the forward and again for the gradient of x.
    """
    hook = module.weight_grad_hook if torch.is_grad_enabled() else None
    if hook is None:
        return _LinearWithHook.apply(x, None, module.bias, None, None, make_weight, *stored)
    layer_input = LayerInput(x, module.recomputes_input)
    module.saves_input = layer_input.is_saved
    return _LinearWithHook.apply(x, module.grad_anchor, module.bias, hook, layer_input, make_weight, *stored)


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight whose backward calls a hook with x [..., in], grad_y [..., out].

    Without a hook it is a plain frozen linear and saves no input. With one, its output needs a gradient
    whether or not its input does: autograd starts at the first layer that is trained, and nothing below it
    is saved. Made from a live `nn.Linear` by `adapt`, so that names, hooks and ZeRO-3 state stay as they are.
    """

    weight_grad_hook: WeightGradHook | None = None
    saves_input: bool | None = None  # in its last forward with a hook; None: there was none
    grad_anchor: Tensor
    recomputes_input: bool

    def forward(self, x: Tensor) -> Tensor:
        return linear_with_hook(self, x, _as_stored, (self.weight,))


def _as_stored(weight: Tensor) -> Tensor:
    return weight


def adapt(linear: nn.Linear, recomputes_input: bool = True) -> None:
    """Turn a live linear into an `AdaptedLinear` in place.

    Args:
        recomputes_input: False where activations are checkpointed, which allows one look at what was saved.
    """
    linear.__class__ = AdaptedLinear
    linear.grad_anchor = torch.zeros((), requires_grad=True)  # has no part in any value
    linear.recomputes_input = recomputes_input
