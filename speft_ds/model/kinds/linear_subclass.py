"""Subclasses of `nn.Linear` with a forward of their own: [out, in]. Falcon's adds the bias by itself."""

from torch import nn

from speft_ds.model.weight_products import adapt
from speft_ds.zero.shards import full_shape

__all__ = ["adapt", "find"]


def find(module: nn.Module) -> list[str]:
    is_linear = isinstance(module, nn.Linear) and module.weight.is_floating_point()
    return ["weight"] if is_linear and len(full_shape(module.weight)) == 2 else []
