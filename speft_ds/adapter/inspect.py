"""A summary of an adapter: where its entries lie, and how far they went."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch

from speft_ds.adapter.format import Adapter
from speft_ds.sparse.mask import Mask

NUM_LARGEST = 10


@dataclass(frozen=True)
class ChangedEntry:
    """One entry: weight[row, column] changes by `delta`."""

    delta: float
    weight: str
    row: int
    column: int


@dataclass(frozen=True)
class Inspection:
    """An adapter, summed up.

    Attributes:
        squares: weight name -> sum of its squared deltas, in the adapter's order.
        largest: the largest changes, the largest first; equal ones in the adapter's order.
    """

    squares: dict[str, float]
    largest: list[ChangedEntry]

    @property
    def norm(self) -> float:
        """The Euclidean norm of all deltas."""
        return math.sqrt(sum(self.squares.values()))


def inspect(adapter: Adapter, num_largest: int = NUM_LARGEST) -> Inspection:
    """Sum up an adapter, a weight at a time. Raises UserError where it is damaged."""
    squares, largest = {}, []
    for name in adapter.names:
        index, delta = adapter.entries(name)
        squares[name] = float(delta.double().square().sum())
        order = delta.abs().argsort(descending=True, stable=True)[:num_largest]
        for flat, value in zip(index[order].tolist(), delta[order].tolist(), strict=True):
            largest.append(ChangedEntry(value, name, *divmod(flat, adapter.shape[name][1])))
        largest = heapq.nlargest(num_largest, largest, key=lambda change: abs(change.delta))  # is stable
    return Inspection(squares, largest)


def mask_counts(adapter: Adapter) -> Mask:
    """The adapter's mask for tables and pictures of density, which need counts alone: no index is read."""
    shape = {name: tuple(sizes) for name, sizes in adapter.facts["shapes"].items()}
    return Mask({name: torch.empty(adapter.count(name), device="meta") for name in shape}, shape)
