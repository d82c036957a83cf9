"""A weight that may be trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.model.weight_grad_hooks import WeightGradHook
from speft_ds.zero.shards import full_shape, matrix_shape, own_elements, shard_of, shard_range


@dataclass
class Target:
    """A weight, the module that multiplies by it, and the module of its kind.

    Attributes:
        attribute: name of the parameter in the module.
        weight_grad_hook: what the module's backward calls with the factors of the weight's gradient, once a
            forward; None: nothing.
        SEES_ALL_USES: whether the hook does, not that in a product alone.
    """

    SEES_ALL_USES: ClassVar[bool] = False

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

    @property
    def numel(self) -> int:
        rows, columns = self.shape
        return rows * columns

    @property
    def rows_are_inputs(self) -> bool:
        """Whether the matrix as it is stored has the inputs in its rows; known once the module has run."""
        return getattr(self.module, f"{self.attribute}_rows_are_inputs", False)

    @property
    def own_range(self) -> tuple[int, int]:
        """[start, stop) of the flat indices that this rank owns."""
        return shard_range(self.numel, collectives.rank(), collectives.world_size())

    @property
    def device(self) -> torch.device:
        """Where this rank's part of the weight is."""
        return shard_of(self.weight).device

    @property
    def written(self) -> list[nn.Parameter]:
        """The parameters whose shards training writes to."""
        return [self.weight]

    def own_values(self) -> Tensor:
        """This rank's part of the weight as it is now, flat, in its dtype: a live view where it is stored so.

        All ranks call this together.
        """
        return own_elements(self.weight)[0]

    def gather(self, owner: int) -> Tensor | None:
        """The complete weight, on that rank alone; None elsewhere. All ranks call this together."""
        shards = collectives.gather(shard_of(self.weight).to(collectives.device()), owner)
        return None if shards is None else shards.view(-1)[: self.numel].view(full_shape(self.weight))

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
