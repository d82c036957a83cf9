"""Sampling: which rows a step trains on.

A function of seed, epoch and position alone: the same at any world size and any split into micro-batches,
and it can start anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial


@lru_cache(maxsize=64)
def permutation(num_rows: int, seed: int, purpose: str, epoch: int = 0) -> list[int]:
    """A shuffle of the rows that depends on its arguments alone."""
    import torch  # late: counting the rows of an epoch needs none

    generator = torch.Generator().manual_seed(hash_seed(seed, purpose, epoch))
    return torch.randperm(num_rows, generator=generator).tolist()


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from printable parts, the same in every process."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def epoch_shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Rows that an epoch takes of each source.

    Args:
        sizes: rows of each source.
        weights: relative shares of an epoch; None: every row of every source once. With weights an epoch is
            as long as the source lasts that is the scarcest for its weight: that one is seen completely.
    """
    if weights is None:
        return list(sizes)
    rows_per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    shares = [round(weight * rows_per_weight) for weight in weights]
    return [min(max(1, share), size) for share, size in zip(shares, sizes, strict=True)]


@dataclass(frozen=True)
class Sampler:
    """The endless sequence of row numbers of a run, over the rows of all sources laid end to end.

    A source of which an epoch takes a part goes on in the next epoch where it was, so that all its rows are
    seen equally often.

    Args:
        sizes: rows of each source.
        weights: relative shares, or None (see `epoch_shares`).
        seed: of the recipe.
        purpose: distinguishes independent orders of one seed.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int
    purpose: str = "order"

    @property
    def shares(self) -> list[int]:
        return epoch_shares(self.sizes, self.weights)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self.shares)

    def ids(self, first: int, count: int) -> list[int]:
        """The row numbers at positions [first, first + count): epochs follow each other without a gap."""
        return _window(self.epoch, len(self), first, count)

    def epoch(self, number: int) -> list[int]:
        """All row numbers of an epoch, in order."""
        return _epoch(self, number)

    def num_steps(self, global_batch: int, steps: int | None, epochs: float | None) -> int:
        """Steps of the run; a last incomplete global batch is filled from the next epoch."""
        if steps is not None:
            return steps
        return math.ceil(round(len(self) * epochs / global_batch, 9))  # 1.1 x 100 is 110.00000000000001


@lru_cache(maxsize=4)
def _epoch(sampler: Sampler, epoch: int) -> list[int]:
    rows, start = [], 0
    for source, (size, share) in enumerate(zip(sampler.sizes, sampler.shares, strict=True)):
        purpose = f"{sampler.purpose} of source {source}"
        shuffled = partial(permutation, size, sampler.seed, purpose)
        # A part of a source begins where that of the epoch before stopped.
        taken = range(size) if share == size else _window(shuffled, size, epoch * share, share)
        rows += [start + row for row in taken]
        start += size
    return [rows[position] for position in permutation(len(rows), sampler.seed, sampler.purpose, epoch)]


def _window(lap: Callable[[int], list[int]], length: int, first: int, count: int) -> list[int]:
    """Positions [first, first + count) of `lap(0)`, `lap(1)`, ... of this length, one after the other."""
    rows: list[int] = []
    while len(rows) < count:
        number, start = divmod(first + len(rows), length)
        rows += lap(number)[start : start + count - len(rows)]
    return rows
