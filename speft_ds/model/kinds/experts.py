"""Experts in one parameter: [experts, out, in], or [experts, in, out] as in gpt-oss and Llama 4."""

from torch import nn

from speft_ds.model.weight_products import adapt
from speft_ds.zero.shards import full_shape

__all__ = ["adapt", "find"]


def find(module: nn.Module) -> list[str]:
    if type(module).__module__.startswith("torch."):
        return []  # a convolution
    shapes = {name: full_shape(weight) for name, weight in module.named_parameters(recurse=False)}
    return [name for name, shape in shapes.items() if len(shape) == 3 and min(shape[1:]) > 1]
