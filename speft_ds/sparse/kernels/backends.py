"""Sparse weight gradients: grad[i, j] = sum_t grad_y[t, i] * x[t, j] for (i, j) in the mask of one weight.

A backend is prepared once a mask and weight and then called once a backward:

    values = backend(x, grad_y)   # x [..., in], grad_y [..., out] -> values [k] fp32, in index order

`dense` is the reference and runs anywhere. Of the others, `auto` takes the one that is made for the device
and the mask's granularity where it pays, by the rules below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speft_ds.errors import UserError
from speft_ds.sparse.kernels import triton_backends
from speft_ds.sparse.kernels.torch_backends import ColumnGradient, DenseGradient, RowGradient, SampledGradient
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient
from speft_ds.sparse.tiles import Tiles

Backend = Callable[[Tensor, Tensor], Tensor]

# To this density `sampled` is faster than `dense` at every shape of benchmarks/kernels.py.
MAX_SAMPLED_DENSITY = 0.1


def make_backend(
    name: str, index: Tensor, shape: tuple[int, int], tiles: Tiles | None = None
) -> tuple[str, Backend]:
    """Prepare the gradient of one weight's entries.

    Args:
        name: `dense`, `sampled`, `element`, `tiled`, or `auto` for the one that should be fastest.
        index: [k] sorted flat indices, on the device of the activations.
        shape: (out_features, in_features) of the weight.
        tiles: what the mask was chosen by; None: single entries.
    Returns:
        (name of the backend, the backend).
    Raises:
        UserError: the named backend does not run on this device, or not with this mask.
    """
    if name == "auto":
        return _best(index, shape, tiles)
    if backend := _make(name, index, shape, tiles):
        return name, backend
    where = {"sampled": "a CPU", "element": "an NVIDIA GPU with Triton"}.get(name, "masks of full tiles")
    raise UserError(
        f"train.sparse_backend={name} is for {where}", "train.sparse_backend", "train.sparse_backend=auto"
    )


def _make(name: str, index: Tensor, shape: tuple[int, int], tiles: Tiles | None):
    """The named backend; None where it does not run on this device, or not with this mask."""
    if name == "dense":
        return DenseGradient(index, shape)
    if name == "sampled" and index.device.type == "cpu":
        return SampledGradient(index, shape)
    if name == "element" and triton_backends.is_available():
        return ElementGradient(index, shape)
    if name == "tiled" and tiles is not None and tiles.largest > 1 and tiles.are_full(index):
        if tiles.width == shape[1]:
            return RowGradient(index, shape)
        if tiles.height == shape[0]:
            return ColumnGradient(index, shape)
        if triton_backends.is_available():
            return BlockGradient(index, shape, tiles)
    return None


def _best(index: Tensor, shape: tuple[int, int], tiles: Tiles | None) -> tuple[str, Backend]:
    on_cpu = index.device.type == "cpu"
    for name in ("tiled",) if on_cpu else ("tiled", "element"):
        backend = _make(name, index, shape, tiles)
        if backend is not None and backend.pays:
            return name, backend
    is_sparse = index.numel() <= MAX_SAMPLED_DENSITY * shape[0] * shape[1]
    name = "sampled" if on_cpu and is_sparse else "dense"
    return name, _make(name, index, shape, tiles)


def expected_backend(
    name: str, density: float, device: torch.device, granularity: str, block_size: int
) -> str:
    """What `make_backend` should come to for an even mask of this density, to plan with.

    On a GPU by the break-even densities that `triton_backends.BREAK_EVEN` comes to.
    """
    if name != "auto":
        return name
    if granularity in ("row", "column") and density <= 0.5:
        return "tiled"
    if device.type == "cpu":
        return "sampled" if density <= MAX_SAMPLED_DENSITY else "dense"
    if granularity == "block":
        return "tiled" if density <= 0.007 * block_size else "dense"
    return "element" if density <= 0.0065 else "dense"
