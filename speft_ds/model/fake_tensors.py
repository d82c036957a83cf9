"""A model's own code run on fake tensors, which have shapes and no data: nothing is computed or allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from speft_ds.model.attention import reads_packing


class _GroupedProducts(TorchDispatchMode):
    """Products by group in every dtype: torch knows their shape for bfloat16 alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._grouped_mm.default:
            x, weight, *ends = args
            groups = ends[0].shape if x.dim() == weight.dim() == 2 else ()  # of a weight's gradient
            return x.new_empty(*groups, x.shape[0], weight.shape[-1])
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_tensors(packing: bool = False) -> Iterator[None]:
    """Tensors that are made inside the block are fake; `packing`: see `attention.reads_packing`."""
    with FakeTensorMode(), _GroupedProducts(), reads_packing(packing):
        yield
