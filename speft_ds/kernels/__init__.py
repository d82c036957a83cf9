"""Sparse weight gradients: grad[i, j] = sum_t grad_y[t, i] * x[t, j] for (i, j) in the mask of one weight.

A backend is prepared once a mask and weight and then called once a backward:

    values = backend(x, grad_y)   # x [tokens, in], grad_y [tokens, out] -> values [k] fp32, in index order
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speft_ds.kernels.dense import DenseGradient
from speft_ds.kernels.sampled import SampledGradient

Backend = Callable[[Tensor, Tensor], Tensor]
BACKENDS: dict[str, type] = {"dense": DenseGradient, "sampled": SampledGradient}

# Above this density the GEMM beats the sampled product on the CPU (measured at 576 to 2048 wide layers).
MAX_SAMPLED_DENSITY = 0.05


def choose_backend(name: str, density: float, device: torch.device) -> str:
    """The backend that `auto` stands for on this device, at the density of one weight's mask."""
    if name != "auto":
        return name
    return "sampled" if device.type == "cpu" and density <= MAX_SAMPLED_DENSITY else "dense"


def make_backend(name: str, index: Tensor, shape: tuple[int, int]) -> Backend:
    """Prepare backend `name` for [k] sorted flat indices into a weight of `shape` (out, in)."""
    return BACKENDS[name](index, shape)
