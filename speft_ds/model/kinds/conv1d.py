"""`transformers`' Conv1D, GPT-2's linear, stored [in, out]: a row of the matrix is an input."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from speft_ds.model.weight_products import adapt

__all__ = ["adapt", "find"]


def find(module: nn.Module) -> list[str]:
    return ["weight"] if isinstance(module, Conv1D) else []
