"""Any other parameter: norms, biases, embeddings, the output head. Autograd makes its gradient.

It is trained whole or not at all. A vector is a matrix of one row.
"""

from __future__ import annotations

from torch import Tensor, nn

from speft_ds.model.kinds.target import Target
from speft_ds.model.weight_grad_hooks import WeightGradHook


def adapt(module: nn.Module, recomputes_input: bool = True) -> None:
    """The module stays as it is."""


class ParameterTarget(Target):
    """A weight whose hook is called with its gradient, once a backward: autograd has summed all its uses."""

    SEES_ALL_USES = True

    @property
    def weight_grad_hook(self) -> WeightGradHook | None:
        return getattr(self.weight, "grad_hook", None)

    @weight_grad_hook.setter
    def weight_grad_hook(self, hook: WeightGradHook | None) -> None:
        weight = self.weight
        if (handle := getattr(weight, "grad_hook_handle", None)) is not None:
            handle.remove()
            weight.grad_hook_handle = None
        weight.grad_hook = hook
        weight.requires_grad_(hook is not None)
        if hook is not None:
            weight.grad_hook_handle = weight.register_post_accumulate_grad_hook(_hand_over)


def _hand_over(weight: Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    if gradient is not None:  # none comes by way of autograd from the loss at the head
        weight.grad_hook(gradient)
