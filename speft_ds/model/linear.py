"""The linear layer whose weight is frozen and whose weight gradient is sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds.model.input_recompute import LayerInput

WeightGradHook = Callable[[Tensor, Tensor], None]


class _LinearWithSink(torch.autograd.Function):
    """A frozen linear that hands (x, grad_y) of its backward to a sink.

    Saves the leaf parameter itself: ZeRO-3 frees its data after the forward and gathers it again before
    this module's backward. A view (as `F.linear` saves) would keep the gathered weight alive in between.
    """

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, sink, layer_input):
        ctx.save_for_backward(weight, *([x] if layer_input is not None and layer_input.is_saved else []))
        ctx.sink, ctx.layer_input = sink, layer_input
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        weight, *saved = ctx.saved_tensors
        if ctx.layer_input is not None:
            ctx.sink(ctx.layer_input.value(saved), grad_y)
        grad_x = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight whose backward feeds `sink(x [..., in], grad_y [..., out])`.

    Without a sink it is a plain frozen linear and saves no input. With one, its output needs a gradient
    whether or not its input does: autograd starts at the first layer that is trained, and nothing below it
    is saved. Made from a live `nn.Linear` by `adapt`, so that names, hooks and ZeRO-3 state stay as they are.
    """

    sink: WeightGradHook | None = None
    anchor: Tensor
    recomputes_input: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_grad_hook is None or not torch.is_grad_enabled():
            return _LinearWithSink.apply(x, None, self.weight, self.bias, None, None)
        layer_input = LayerInput(x, self.recomputes_input)
        return _LinearWithSink.apply(
            x, self.anchor, self.weight, self.bias, self.weight_grad_hook, layer_input
        )


def adapt(linear: nn.Linear, recomputes_input: bool = True) -> None:
    """Turn a live linear into an `AdaptedLinear` in place.

    Args:
        recomputes_input: False where activations are checkpointed, which allows one look at what was saved.
    """
    linear.__class__ = AdaptedLinear
    linear.anchor = torch.zeros((), requires_grad=True)  # has no part in any value
    linear.recomputes_input = recomputes_input


@contextmanager
def weight_grad_hooks(
    targets: dict[str, AdaptedLinear], sinks: dict[str, WeightGradHook | None]
) -> Iterator[None]:
    """Inside the block, the backward of each target feeds its sink, and what it fed before not."""
    before = {name: linear.weight_grad_hook for name, linear in targets.items()}
    try:
        for name, linear in targets.items():
            linear.weight_grad_hook = sinks[name]
        yield
    finally:
        for name, linear in targets.items():
            linear.weight_grad_hook = before[name]


def chain_hooks(*sinks: WeightGradHook | None) -> WeightGradHook | None:
    """One sink that feeds all that are there."""
    there = [sink for sink in sinks if sink is not None]
    if len(there) < 2:
        return there[0] if there else None

    def feed(x: Tensor, grad_y: Tensor) -> None:
        for sink in there:
            sink(x, grad_y)

    return feed
