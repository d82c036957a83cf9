"""`nn.Linear`: [out, in]."""

from torch import nn

from speft_ds.model.linear import AdaptedLinear, adapt

__all__ = ["adapt", "find"]


def find(module: nn.Module) -> list[str]:
    return ["weight"] if type(module) in (nn.Linear, AdaptedLinear) else []
