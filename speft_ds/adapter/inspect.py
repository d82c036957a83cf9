"""What an adapter is like, and how two differ: where the entries lie, how far they went, what both have."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from speft_ds.adapter.apply import check_same_base
from speft_ds.adapter.format import NO_ENTRIES, Adapter, Entries
from speft_ds.sparse.mask import Mask

NUM_LARGEST = 10


class ChangedEntry(NamedTuple):
    """One entry: weight[row, column] changes by `delta`."""

    delta: float
    weight: str
    row: int
    column: int


class Inspection(NamedTuple):
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


@dataclass
class AdapterDifference:
    """Counts and sums over the entries of two adapters, A and B, of one weight or of many.

    Attributes:
        only_a, only_b: entries that one alone has; equal, differing: entries of both, by their deltas.
        opposite: of those that differ, the ones with opposite signs.
        squares_a, squares_b, squares_difference: sums of squared deltas, of A, of B and of A - B, where a
            missing entry counts as 0.
        product: sum of the products of the deltas of A and B.
    """

    only_a: int = 0
    only_b: int = 0
    equal: int = 0
    differing: int = 0
    opposite: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_difference: float = 0.0
    product: float = 0.0

    @property
    def common(self) -> int:
        return self.equal + self.differing

    @property
    def jaccard(self) -> float:
        """Entries of both over entries of either; 1 where there are none."""
        either = self.common + self.only_a + self.only_b
        return self.common / either if either else 1.0

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B as vectors of all weights; None where one is 0."""
        lengths = math.sqrt(self.squares_a * self.squares_b)
        return self.product / lengths if lengths else None


def diff(a: Adapter, b: Adapter | None) -> dict[str, AdapterDifference]:
    """Weight name -> difference of its entries, for all weights that either adapter has entries of.

    Args:
        b: None to compare with the base, that is, with no entries.
    Raises:
        UserError: the adapters are of different bases, or damaged.
    """
    if b is None:
        return {name: _compare(a.entries(name), NO_ENTRIES) for name in a.names}
    check_same_base([a, b])
    return {name: _compare(a.entries(name), b.entries(name)) for name in dict.fromkeys([*a.names, *b.names])}


def total(differences: Iterable[AdapterDifference]) -> AdapterDifference:
    """Of several weights together."""
    return AdapterDifference(*map(sum, zip(*map(astuple, differences), strict=True)))


def _compare(a: Entries, b: Entries) -> AdapterDifference:
    """The entries of one weight in two adapters."""
    index, position = torch.cat([a[0], b[0]]).unique(return_inverse=True)
    of_a, of_b = position.split([len(a[0]), len(b[0])])
    in_a, in_b = torch.zeros(2, index.numel(), dtype=torch.bool)
    delta_a, delta_b = torch.zeros(2, index.numel(), dtype=torch.float64)
    in_a[of_a] = in_b[of_b] = True
    delta_a[of_a], delta_b[of_b] = a[1].double(), b[1].double()
    both, equal = in_a & in_b, delta_a == delta_b
    return AdapterDifference(
        only_a=int((in_a & ~both).sum()),
        only_b=int((in_b & ~both).sum()),
        equal=int((both & equal).sum()),
        differing=int((both & ~equal).sum()),
        opposite=int((delta_a * delta_b < 0).sum()),
        squares_a=float(delta_a.square().sum()),
        squares_b=float(delta_b.square().sum()),
        squares_difference=float((delta_a - delta_b).square().sum()),
        product=float((delta_a * delta_b).sum()),
    )


def diff_whole(a: Adapter, b: Adapter | None) -> dict[str, str]:
    """Weight -> how the two differ: where it is missing, or the norm of the difference."""
    found = {}
    for name in dict.fromkeys([*a.whole, *(b.whole if b else [])]):
        having = [adapter for adapter in (a, b) if adapter is not None and name in adapter.whole]
        values = [adapter.value(name).float() for adapter in having]
        if len(having) == 1:
            found[name] = f"only in {having[0].folder}"
        elif values[0].shape != values[1].shape:
            found[name] = f"of shape {tuple(values[0].shape)} and {tuple(values[1].shape)}"
        else:
            norm = float((values[0] - values[1]).norm())
            found[name] = f"differs, norm {norm:.4g}" if norm else "equal"
    return found
