"""The CPU backend: a sampled dense-dense product (SDDMM) that touches only the masked entries."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from speft_ds.sparse.kernels.transpose import SharedTranspose, transpose

# Of one product, at most: what is longer falls out of the cache before it is used again.
TOKENS, INPUT_BYTES = 1024, 6 * 2**20


def transpose_fp32(x: Tensor) -> Tensor:
    """[..., features] -> [features, tokens] fp32: transposed first, while it is narrow."""
    return transpose(x).float()


def split_for_cache(x: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """[..., features], input or gradient of a layer -> views [tokens of one product, features]."""
    flat = x.reshape(-1, x.shape[-1])
    num_tokens = flat.shape[0]
    num_parts = max(1, -(-num_tokens // TOKENS), -(-4 * num_tokens * in_features // INPUT_BYTES))
    return flat.chunk(num_parts)


shared_transpose = SharedTranspose(
    lambda x: [transpose_fp32(part) for part in split_for_cache(x, x.shape[-1])]
)


class SampledGradient:
    """`torch.sparse.sampled_addmm` on a CSR pattern that is laid out once a mask.

    The product takes the dot product of two rows of [features, tokens] for each entry. torch has it in fp32
    only; the casts also give fp32 accumulation to bf16 activations.

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
        total = None
        for x_t, part in zip(shared_transpose(x), split_for_cache(grad_y, x.shape[-1]), strict=True):
            product = torch.sparse.sampled_addmm(self.pattern, transpose_fp32(part), x_t.t(), beta=0.0)
            total = product.values() if total is None else total.add_(product.values())
        return total
