"""`transformers`' Conv1D, GPT-2's linear, stored [in, out]: a row of the matrix is an input."""

from torch import nn

from speft_ds.model.weight_products import adapt

__all__ = ["adapt", "find"]


def find(module: nn.Module) -> list[str]:
    kind = type(module)  # by name: not all that look for weights need transformers
    return ["weight"] if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") else []
