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
from speft_ds.sparse.kernels import triton_launch
from speft_ds.sparse.kernels.dense import DenseGradient
from speft_ds.sparse.kernels.element import ElementGradient
from speft_ds.sparse.kernels.sampled import SampledGradient
from speft_ds.sparse.kernels.tiled import BlockGradient, is_tiled, make_tiled
from speft_ds.sparse.tiles import Tiles

Backend = Callable[[Tensor, Tensor], Tensor]

# To this density `sampled` is faster than `dense` at every shape of benchmarks/kernels.py.
MAX_SAMPLED_DENSITY = 0.1


def available_backends(device: torch.device) -> list[str]:
    """Those that can compute the entries of any mask on this device."""
    if device.type == "cpu":
        return ["dense", "sampled"]
    return ["dense", "element"] if triton_launch.is_available() else ["dense"]


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
    on_cpu = index.device.type == "cpu"
    if name == "dense":
        return name, DenseGradient(index, shape)
    if name == "sampled" and on_cpu:
        return name, SampledGradient(index, shape)
    if name == "element" and triton_launch.is_available():
        return name, ElementGradient(index, shape)
    if name == "tiled" and (backend := _tiled(index, shape, tiles)):
        return name, backend
    where = {"sampled": "a CPU", "element": "an NVIDIA GPU with Triton"}.get(name, "masks of full tiles")
    raise UserError(
        f"train.sparse_backend={name} is for {where}", "train.sparse_backend", "train.sparse_backend=auto"
    )


def _best(index: Tensor, shape: tuple[int, int], tiles: Tiles | None) -> tuple[str, Backend]:
    tiled = _tiled(index, shape, tiles)
    if tiled is not None and tiled.pays:
        return "tiled", tiled
    if index.device.type == "cpu":
        if index.numel() <= MAX_SAMPLED_DENSITY * shape[0] * shape[1]:
            return "sampled", SampledGradient(index, shape)
    elif triton_launch.is_available():
        element = ElementGradient(index, shape)
        if element.pays:
            return "element", element
    return "dense", DenseGradient(index, shape)


def _tiled(index: Tensor, shape: tuple[int, int], tiles: Tiles | None):
    """The backend of full tiles, where the mask is made of them and the device can."""
    if tiles is None or tiles.largest == 1 or not is_tiled(index, tiles):
        return None
    backend = make_tiled(index, shape, tiles)
    return None if isinstance(backend, BlockGradient) and not triton_launch.is_available() else backend


def expected_backend(
    name: str, density: float, device: torch.device, granularity: str, block_size: int
) -> str:
    """What `make_backend` should come to for an even mask of this density, to plan with.

    On a GPU by the break-even densities that `triton_launch.BREAK_EVEN` comes to.
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
