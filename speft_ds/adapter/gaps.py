"""Sorted indices as a string of bytes: the gaps between them, each as an LEB128 varint.

A gap is the step from the index before (the first from -1), so that it is at least 1. Seven bits a byte, the
low ones first; the high bit says that more bytes follow. Gaps below 128 take a byte, below 16,384 two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 9  # of a varint: 63 bits, what an int64 holds


def encode_gaps(index: Tensor) -> Tensor:
    """[n] flat indices, int64 or int32 -> [m] uint8.

    Raises:
        ValueError: they are negative or not strictly increasing.
    """
    gaps = np.diff(index.to("cpu", torch.int64).numpy(), prepend=np.int64(-1))
    if gaps.size and int(gaps.min()) < 1:
        raise ValueError("indices out of range or unsorted")
    length = np.ones(gaps.size, np.int64)
    for number in range(1, MAX_BYTES):
        length += gaps >= 1 << 7 * number
    start = np.cumsum(length) - length
    coded = np.empty(int(length.sum()), np.uint8)
    for number in range(int(length.max(initial=0))):
        chosen = length > number
        more = np.where(length[chosen] > number + 1, 0x80, 0)
        coded[start[chosen] + number] = (gaps[chosen] >> 7 * number & 0x7F) | more
    return torch.from_numpy(coded)


def decode_gaps(coded: Tensor, count: int, numel: int) -> Tensor:
    """[m] uint8 -> [count] int64 flat indices, strictly increasing, each in [0, numel).

    Raises:
        ValueError: the bytes are not `count` varints in their shortest form, or the indices do not fit.
    """
    data = coded.numpy()
    last = np.flatnonzero(data < 0x80)  # where each varint ends
    if last.size != count or (data.size and data[-1] >= 0x80):
        raise ValueError(f"the gaps are {last.size} whole varints, not {count}")
    start = np.concatenate([np.zeros(1, np.int64), last + 1])[:count]
    length = last - start + 1
    if int(length.max(initial=0)) > MAX_BYTES:
        raise ValueError(f"a gap has more than {MAX_BYTES} bytes")
    if (data[last] == 0).any():
        raise ValueError("a gap is 0, or longer than it need be")
    gaps = np.zeros(count, np.int64)
    for number in range(int(length.max(initial=0))):
        chosen = length > number
        gaps[chosen] |= (data[start[chosen] + number] & 0x7F).astype(np.int64) << 7 * number
    # Gaps up to `numel` cannot leap over the negative numbers: a sum that overflows does not increase.
    index = np.cumsum(gaps) - 1
    if count and (int(gaps.max()) > numel or int(index[-1]) >= numel or not (np.diff(index) > 0).all()):
        raise ValueError("indices out of range or unsorted")
    return torch.from_numpy(index)
