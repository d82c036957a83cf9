"""Hooks for the gradients of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from speft_ds.model.kinds.target import Target

# (columns, rows) of a weight's gradient sum_t rows[t, i] * columns[t, j]: of a linear x and grad_y. Of a
# stack of experts, the tokens are sorted by expert, and a third argument [experts] says where each expert's
# end. Of a weight that is no factor of a product, as a norm's or an embedding's, the gradient itself, or
# its rows that the hook names (`rows`).
WeightGradHook = Callable[..., None]


@contextmanager
def weight_grad_hooks(targets: dict[str, Target], hooks: dict[str, WeightGradHook | None]) -> Iterator[None]:
    """Inside the block, the backward of each target calls this hook of it and not the one before."""
    before = {name: target.weight_grad_hook for name, target in targets.items()}
    try:
        for name, target in targets.items():
            target.weight_grad_hook = hooks[name]
        yield
    finally:
        for name, target in targets.items():
            target.weight_grad_hook = before[name]


@contextmanager
def gradients_past_hooks(targets: dict[str, Target]) -> Iterator[set[str]]:
    """Inside the block, names of targets are put into a set whose weight gets a gradient by autograd itself.

    The products that hand their factors to a hook give their weight none. What autograd finds is of another
    use: a norm, a penalty, a slice, a copy, another module.
    """
    past: set[str] = set()
    handles = []
    # One in few bits is no parameter, nothing else can use it; the hook of any other sees all uses.
    live = {
        name: target
        for name, target in targets.items()
        if isinstance(target.weight, nn.Parameter) and not target.SEES_ALL_USES
    }
    try:
        for name, target in live.items():
            weight = target.weight.requires_grad_(True)
            handles.append(weight.register_hook(lambda grad, n=name: None if grad is None else past.add(n)))
        yield past
    finally:
        for handle in handles:
            handle.remove()
        for target in live.values():
            target.weight.requires_grad_(False).grad = None


def chain_hooks(*hooks: WeightGradHook | None) -> WeightGradHook | None:
    """One hook that calls all that are not None; None where all are."""
    present = [hook for hook in hooks if hook is not None]
    if len(present) < 2:
        return present[0] if present else None

    def call_all(*factors: Tensor) -> None:
        for hook in present:
            hook(*factors)

    return call_all
