"""A weight that may be trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import nn

from speft_ds.model.weight_grad_hooks import WeightGradHook
from speft_ds.zero.shards import matrix_shape


@dataclass
class Target:
    """A weight, the module that multiplies by it, and the module of its kind.

    Attributes:
        attribute: name of the parameter in the module.
        weight_grad_hook: what the module's backward calls with the factors of the weight's gradient, once a
            forward; None: nothing.
    """

    module: nn.Module
    attribute: str
    kind: ModuleType

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix, whether or not the weight is gathered."""
        return matrix_shape(self.weight)

    def adapt(self, recomputes_input: bool = True) -> None:
        """Have the module call the hook.

        Args:
            recomputes_input: False where activations are checkpointed, which allows one look at what was
                saved.
        """
        self.kind.adapt(self.module, recomputes_input)

    @property
    def weight_grad_hook(self) -> WeightGradHook | None:
        return getattr(self.module, f"{self.attribute}_grad_hook", None)

    @weight_grad_hook.setter
    def weight_grad_hook(self, hook: WeightGradHook | None) -> None:
        setattr(self.module, f"{self.attribute}_grad_hook", hook)
