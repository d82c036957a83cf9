"""Launches of the Triton programs: sizes, how tokens are split, and the passes that backends share."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

TOKENS = 64  # of one step: 128 bytes of 16-bit activations, a whole cache line
SLOTS = 128  # columns of the weight that one program takes
SUM_BLOCK = 1024
# Tokens are split so that the part of x that all running programs share stays in the L2 cache, 50 MB on an
# H100. A split costs 8 bytes per entry, written and read once, hence a least length and a largest buffer.
SLAB_BYTES = 2**24
LEAST_TOKENS = 512
MOST_PARTIAL = 2**26
# Dense multiply-adds that an H100 does in the time in which it moves one bf16 number from its L2 cache:
# 300 T/s over 2.5 T/s. Not measured.
BREAK_EVEN = 120


def is_available() -> bool:
    """Whether Triton is installed and there is a GPU that programs are made for: NVIDIA's, 8.0 or later."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def pays(moved: int, shape: tuple[int, int]) -> bool:
    """Whether moving so many features per token from the L2 cache takes less time than the dense product."""
    return moved * BREAK_EVEN < shape[0] * shape[1]


def options(dtype: torch.dtype) -> dict[str, int]:
    """Launch options of the products: as many tokens and stages as shared memory holds on an A10 (99 KiB)."""
    if dtype.itemsize == 2:
        return {"SLOTS": SLOTS, "TOKENS": TOKENS, "num_warps": 4, "num_stages": 3}
    return {"SLOTS": SLOTS, "TOKENS": TOKENS // 2, "num_warps": 4, "num_stages": 2}


def split_tokens(tokens: int, features: int, itemsize: int, num_entries: int) -> tuple[int, int]:
    """(splits, tokens of each but the last, a multiple of TOKENS)."""
    least = max(LEAST_TOKENS, SLAB_BYTES // (features * itemsize))
    splits = max(1, min(-(-tokens // least), MOST_PARTIAL // max(1, num_entries)))
    length = max(1, -(-tokens // (splits * TOKENS))) * TOKENS
    return max(1, -(-tokens // length)), length


def transpose(x: Tensor) -> Tensor:
    """[..., features] -> [features, tokens] in x's dtype; tokens padded with zeros to whole TOKENS."""
    from speft_ds.sparse.kernels import programs

    x = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, features = x.shape
    padded = -(-tokens // TOKENS) * TOKENS
    x_t = torch.empty(features, padded, dtype=x.dtype, device=x.device)
    grid = (padded // TOKENS, -(-features // TOKENS))
    if x_t.numel():
        programs.transpose_tile[grid](x, x_t, tokens, features, padded, TOKENS=TOKENS, FEATURES=TOKENS)
    return x_t


def sum_over_splits(partial: Tensor, order: Tensor | None = None) -> Tensor:
    """[splits, k] fp32 -> [k]: added over the splits in their order; entry e goes to place order[e], or e."""
    from speft_ds.sparse.kernels import programs

    splits, num_entries = partial.shape
    if splits == 1 and order is None:
        return partial[0]
    ordered = order is not None
    values = torch.empty(num_entries, dtype=torch.float32, device=partial.device)
    programs.sum_splits[(-(-num_entries // SUM_BLOCK),)](
        partial, values, order if ordered else partial, num_entries, splits, ORDERED=ordered, BLOCK=SUM_BLOCK
    )
    return values
