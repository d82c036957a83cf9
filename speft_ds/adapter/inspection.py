"""What an adapter is like: where its entries lie and how far they went."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch

from speft_ds.adapter.derive import Entries
from speft_ds.adapter.format import Adapter
from speft_ds.sparse.mask import Mask

NUM_LARGEST = 10


@dataclass(frozen=True)
class Change:
    """One entry: weight[row, column] changes by `delta`."""

    delta: float
    weight: str
    row: int
    column: int


@dataclass(frozen=True)
class WeightSummary:
    """The entries of a weight: their number, the sum of their squared deltas, the largest abs(delta)."""

    count: int
    squares: float
    largest: float


@dataclass(frozen=True)
class Inspection:
    """An adapter, summed up.

    Attributes:
        weights: by name, in the adapter's order.
        changes: the largest ones, the largest first; equal ones in the adapter's order.
    """

    weights: dict[str, WeightSummary]
    changes: list[Change]

    @property
    def norm(self) -> float:
        """The Euclidean norm of all deltas."""
        return math.sqrt(sum(weight.squares for weight in self.weights.values()))

    @property
    def num_entries(self) -> int:
        return sum(weight.count for weight in self.weights.values())

    @property
    def largest(self) -> float:
        return max((weight.largest for weight in self.weights.values()), default=0.0)


def inspect(adapter: Adapter, num_largest: int = NUM_LARGEST) -> Inspection:
    """Sum up an adapter, a weight at a time. Raises UserError where it is damaged."""
    weights, changes = {}, []
    for name in adapter.names:
        index, delta = adapter.entries(name)
        squares = float(delta.double().square().sum())
        weights[name] = WeightSummary(len(delta), squares, float(delta.abs().max()))
        changes += largest_changes(name, adapter.shape[name], (index, delta), num_largest)
        changes = heapq.nlargest(num_largest, changes, key=lambda change: abs(change.delta))
    return Inspection(weights, changes)


def largest_changes(name: str, shape: tuple[int, int], entries: Entries, count: int) -> list[Change]:
    """Up to `count` entries of a weight by abs(delta); equal ones by index."""
    index, delta = entries
    order = delta.abs().argsort(descending=True, stable=True)[:count]
    places = zip(index[order].tolist(), delta[order].tolist(), strict=True)
    return [Change(value, name, *divmod(flat, shape[1])) for flat, value in places]


def counts(adapter: Adapter) -> Mask:
    """The adapter's mask for tables and pictures of density, which look at counts alone: no index is read."""
    shape = {name: tuple(sizes) for name, sizes in adapter.facts["shapes"].items()}
    number = {name: adapter.count(name) if name in adapter.shape else 0 for name in shape}
    return Mask({name: torch.empty(number[name], device="meta") for name in shape}, shape)
