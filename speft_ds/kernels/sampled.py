"""The CPU backend: a sampled dense-dense product (SDDMM) that touches only the masked entries."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class SampledGradient:
    """`torch.sparse.sampled_addmm` on a CSR pattern that is laid out once a mask.

    Args:
        index: [k] sorted flat indices.
        shape: (out_features, in_features) of the weight.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int]):
        out_features, in_features = shape
        rows = torch.div(index, in_features, rounding_mode="floor")
        columns = index - rows * in_features
        row_starts = torch.zeros(out_features + 1, dtype=index.dtype, device=index.device)
        row_starts[1:] = torch.cumsum(torch.bincount(rows, minlength=out_features), 0)
        zeros = torch.zeros(index.numel(), dtype=torch.float32, device=index.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.pattern = torch.sparse_csr_tensor(
                row_starts, columns, zeros, size=shape, check_invariants=True
            )

    def __call__(self, x: Tensor, grad_y: Tensor) -> Tensor:
        # MKL has this product in fp32 only; the casts also give fp32 accumulation to bf16 activations.
        product = torch.sparse.sampled_addmm(self.pattern, grad_y.float().t(), x.float(), beta=0.0)
        return product.values()
