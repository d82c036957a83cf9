"""The k largest magnitudes of a stream of tensors, exactly, holding one tensor at a time.

Two passes count the values by the bits of their magnitudes and find the k-th largest; a third takes the
values. The passes must see the same tensors in the same order: equal magnitudes are taken from its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from speft_ds.selection.radix import count_digits, positions, score_of, within

LOW_BITS = 16  # of a magnitude's 32: each pass counts half of them
NUM_BINS = 2**LOW_BITS


class Largest:
    """Takes the k values of the largest magnitude; of equal ones, the first that it sees.

    Attributes:
        threshold: the k-th largest magnitude; infinity where nothing is taken.
        num_ties: how many values of just this magnitude are still to be taken.
    """

    def __init__(self, threshold: float, num_ties: int):
        self.threshold, self.num_ties = threshold, num_ties

    @classmethod
    def find(cls, stream: Callable[[], Iterable[Tensor]], k: int) -> Largest:
        """
        Args:
            stream: starts a pass: [n] finite fp32 values at a time.
            k: how many to take; all, where the stream has fewer.
        """
        if k == 0:
            return cls(math.inf, 0)
        high, above = _digit(_count(stream(), _high_digits), k)
        first = (high - NUM_BINS // 2) << LOW_BITS  # the top digit holds the sign: its bins start at -2^15
        last = first + NUM_BINS - 1
        low, higher = _digit(_count(stream(), lambda values: _low_digits(values, first, last)), k - above)
        return cls(score_of(first + low), k - above - higher)

    def take(self, values: Tensor) -> Tensor:
        """Sorted int64 positions of those of the next [n] values that are taken."""
        magnitude = values.abs()
        chosen = positions(magnitude, lambda chunk: chunk >= self.threshold)
        is_tie = magnitude[chosen] == self.threshold
        kept = ~is_tie | (is_tie.cumsum(0) <= self.num_ties)
        self.num_ties -= int((is_tie & kept).sum())
        return chosen[kept]


def _count(tensors: Iterable[Tensor], count: Callable[[Tensor], Tensor]) -> Tensor:
    """[bins] int64: the sum of the histograms of all tensors."""
    return sum((count(values) for values in tensors), torch.zeros(NUM_BINS, dtype=torch.int64))


def _high_digits(values: Tensor) -> Tensor:
    return count_digits(values.abs(), LOW_BITS, 32 - LOW_BITS, None)


def _low_digits(values: Tensor, first: int, last: int) -> Tensor:
    """Of the values whose keys run from `first` to `last`."""
    keys, _ = within(values.abs(), first, last, None)
    return count_digits(keys, 0, LOW_BITS, None)


def _digit(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th value from above (the lowest, of fewer), and how many lie above it."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    digit = max(int((at_least >= k).sum()) - 1, 0)
    return digit, int(at_least[digit] - histogram[digit])
