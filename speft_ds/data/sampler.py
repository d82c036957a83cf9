"""Sampling: which rows a step trains on.

A function of seed, epoch and position alone: the same at any world size and any split into micro-batches,
and it can start anywhere.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise


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
    """Rows, or groups of them, that an epoch takes of each source.

    Args:
        sizes: of each source.
        weights: relative shares of an epoch; None: all of every source once. With weights an epoch is
            as long as the source lasts that is the scarcest for its weight: that one is seen completely.
    """
    if weights is None:
        return list(sizes)
    rows_per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    shares = [round(weight * rows_per_weight) for weight in weights]
    return [min(max(1, share), size) for share, size in zip(shares, sizes, strict=True)]


@dataclass(frozen=True, eq=False)
class Sampler:
    """The endless sequence of row numbers of a run, over the rows of all sources laid end to end.

    What is shuffled are groups of rows that belong together, like those of a conversation: each stays in
    order. A source of which an epoch takes a part goes on in the next epoch where it was, so that all its
    groups are seen equally often.

    Args:
        sizes: rows of each source.
        weights: relative shares, or None (see `epoch_shares`).
        seed: of the recipe.
        purpose: distinguishes independent orders of one seed.
        edges: where each group begins, and where the last one ends; None: each row is one.
        counts: how much each group is for the weights, like the conversations in a pack; None: 1.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int
    purpose: str = "order"
    edges: Sequence[int] | None = None
    counts: Sequence[int] | None = None

    @cached_property
    def shares(self) -> list[int]:
        """What an epoch takes of each source, as `counts` has it."""
        return epoch_shares([sum(counts) for _, counts in self._groups], self.weights)

    def __len__(self) -> int:
        """Rows of an epoch; of the first, where weights choose other groups in the next."""
        if not self._is_uneven:
            return sum(self.sizes if self.weights is None else self.shares)
        return len(self.epoch(0))

    def ids(self, first: int, count: int) -> list[int]:
        """The row numbers at positions [first, first + count): epochs follow each other without a gap."""
        number, start = self.locate(first)
        rows = self.epoch(number)[start : start + count]
        while len(rows) < count:
            number += 1
            rows += self.epoch(number)[: count - len(rows)]
        return rows

    def epoch(self, number: int) -> list[int]:
        """All row numbers of an epoch, in order."""
        return _epoch(self, number)

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and which of its rows stands there."""
        if not self._is_uneven:
            return divmod(position, len(self))
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
        number = bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]

    def num_epochs(self, position: int) -> float:
        """How many epochs the rows before a position are."""
        number, row = self.locate(position)
        return number + (row / self._length(number) if row else 0)

    def num_steps(self, global_batch: int, steps: int | None, epochs: float | None) -> int:
        """Steps of the run; a last incomplete global batch is filled from the next epoch."""
        if steps is not None:
            return steps
        part, complete = math.modf(epochs)
        if self._is_uneven:
            num_rows = sum(map(self._length, range(int(complete)))) + part * self._length(int(complete))
        else:
            num_rows = len(self) * epochs
        return math.ceil(round(num_rows / global_batch, 9))  # 1.1 x 100 is 110.00000000000001

    def _length(self, epoch: int) -> int:
        return len(self.epoch(epoch)) if self._is_uneven else len(self)

    @cached_property
    def _is_uneven(self) -> bool:
        """Whether epochs differ in length: weights choose groups of different sizes."""
        edges, counts = self.edges, self.counts
        is_plain = edges is None or len(edges) == sum(self.sizes) + 1
        return self.weights is not None and not (is_plain and (counts is None or set(counts) == {1}))

    @cached_property
    def _starts(self) -> list[int]:
        """Of the epochs so far, the position of the first row."""
        return [0]

    @cached_property
    def _groups(self) -> list[tuple[list[range], Sequence[int]]]:
        """Of each source its groups, and how much each is."""
        edges = range(sum(self.sizes) + 1) if self.edges is None else self.edges
        groups = [range(*edge) for edge in pairwise(edges)]
        counts = [1] * len(groups) if self.counts is None else self.counts
        borders = [bisect_left(edges, row) for row in accumulate(self.sizes, initial=0)]
        return [(groups[start:stop], counts[start:stop]) for start, stop in pairwise(borders)]


@lru_cache(maxsize=4)
def _epoch(sampler: Sampler, epoch: int) -> list[int]:
    taken: list[range] = []
    for source, ((groups, counts), share) in enumerate(zip(sampler._groups, sampler.shares, strict=True)):
        purpose = f"{sampler.purpose} of source {source}"
        # A part of a source begins where that of the epoch before stopped.
        is_complete = share == sum(counts)
        shuffled = partial(permutation, len(groups), sampler.seed, purpose)
        numbers = range(len(groups)) if is_complete else _window(shuffled, counts, epoch * share, share)
        taken += [groups[number] for number in numbers]
    order = permutation(len(taken), sampler.seed, sampler.purpose, epoch)
    return [row for place in order for row in taken[place]]


def _window(lap: Callable[[int], list[int]], counts: Sequence[int], first: int, length: int) -> list[int]:
    """The groups that begin in [first, first + length) when `lap(0)`, `lap(1)`, ... follow each other."""
    found: list[int] = []
    number, start = divmod(first, sum(counts))
    start = first - start
    while start < first + length:
        for group in lap(number):
            if first <= start < first + length:
                found.append(group)
            start += counts[group]
        number += 1
    return found
