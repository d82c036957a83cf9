"""Sorted indices, coded as gaps: LEB128 varints."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_GAP_BYTES = 9  # 63 bits, what an int64 holds


def encode_gaps(index: Tensor) -> Tensor:
    """Code sorted indices as the gaps between them, each as an LEB128 varint.

    A gap is the step from the previous index (the first from -1), so it is at least 1. A byte holds seven
    bits, the low ones first; its high bit says that another byte follows.

    Args:
        index: [n] flat indices, int64 or int32; returned are [m] uint8.
    Raises:
        ValueError: they are negative or not strictly increasing.
    """
    gaps = np.diff(index.to("cpu", torch.int64).numpy(), prepend=np.int64(-1))
    if gaps.size and int(gaps.min()) < 1:
        raise ValueError("indices out of range or unsorted")
    length = np.ones(gaps.size, np.int64)
    for number in range(1, MAX_GAP_BYTES):
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
        raise ValueError(f"the gaps are {last.size} complete varints, not {count}")
    start = np.concatenate([np.zeros(1, np.int64), last + 1])[:count]
    length = last - start + 1
    if int(length.max(initial=0)) > MAX_GAP_BYTES:
        raise ValueError(f"a gap has more than {MAX_GAP_BYTES} bytes")
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
