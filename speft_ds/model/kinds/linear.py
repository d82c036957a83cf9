"""`nn.Linear`: [out, in]. A frozen weight and a hook for the gradient of some of its entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds.model.input_recompute import LayerInput
from speft_ds.model.weight_grad_hooks import WeightGradHook


def find(module: nn.Module) -> list[str]:
    return ["weight"] if type(module) in (nn.Linear, AdaptedLinear) else []


class _LinearWithHook(torch.autograd.Function):
    """A frozen linear that hands (x, grad_y) of its backward to a hook.

    Saves the leaf parameter itself: ZeRO-3 frees its data after the forward and gathers it again before
    this module's backward. A view (as `F.linear` saves) would keep the gathered weight alive in between.
    """

    @staticmethod
    def forward(ctx, x, grad_anchor, weight, bias, hook, layer_input):
        saved = [] if layer_input is None else layer_input.to_save(x, getattr(hook, "columns", None))
        ctx.save_for_backward(weight, *saved)
        ctx.hook, ctx.layer_input = hook, layer_input
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        weight, *saved = ctx.saved_tensors
        if ctx.layer_input is not None:
            ctx.hook(ctx.layer_input.value(saved), grad_y)
        grad_x = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None, None


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
        if self.weight_grad_hook is None or not torch.is_grad_enabled():
            return _LinearWithHook.apply(x, None, self.weight, self.bias, None, None)
        layer_input = LayerInput(x, self.recomputes_input)
        self.saves_input = layer_input.is_saved
        return _LinearWithHook.apply(
            x, self.grad_anchor, self.weight, self.bias, self.weight_grad_hook, layer_input
        )


def adapt(linear: nn.Linear, recomputes_input: bool = True) -> None:
    """Turn a live linear into an `AdaptedLinear` in place.

    Args:
        recomputes_input: False where activations are checkpointed, which allows one look at what was saved.
    """
    linear.__class__ = AdaptedLinear
    linear.grad_anchor = torch.zeros((), requires_grad=True)  # has no part in any value
    linear.recomputes_input = recomputes_input
