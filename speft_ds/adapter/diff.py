"""The difference of two adapters of one base: entries that only one has, deltas that differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from speft_ds.adapter.derive import check_same_base
from speft_ds.adapter.format import NO_ENTRIES, Adapter, Entries


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
    of_a, of_b = position[: len(a[0])], position[len(a[0]) :]
    delta = torch.zeros(2, index.numel(), dtype=torch.float64)
    is_there = torch.zeros(2, index.numel(), dtype=torch.bool)
    delta[0, of_a], delta[1, of_b] = a[1].double(), b[1].double()
    is_there[0, of_a] = is_there[1, of_b] = True
    both, equal = is_there.all(0), delta[0] == delta[1]
    return AdapterDifference(
        only_a=int((is_there[0] & ~both).sum()),
        only_b=int((is_there[1] & ~both).sum()),
        equal=int((both & equal).sum()),
        differing=int((both & ~equal).sum()),
        opposite=int((delta[0] * delta[1] < 0).sum()),
        squares_a=float(delta[0].square().sum()),
        squares_b=float(delta[1].square().sum()),
        squares_difference=float((delta[0] - delta[1]).square().sum()),
        product=float((delta[0] * delta[1]).sum()),
    )


def diff_heads(a: Adapter, b: Adapter | None) -> dict[str, str]:
    """Name of a head -> how the two differ: where it is missing, or the norm of the difference."""
    found = {}
    for name in dict.fromkeys([*a.heads, *(b.heads if b else [])]):
        having = [adapter for adapter in (a, b) if adapter is not None and name in adapter.heads]
        values = [adapter.head(name).float() for adapter in having]
        if len(having) == 1:
            found[name] = f"only in {having[0].folder}"
        elif values[0].shape != values[1].shape:
            found[name] = f"of shape {tuple(values[0].shape)} and {tuple(values[1].shape)}"
        else:
            norm = float((values[0] - values[1]).norm())
            found[name] = f"differs, norm {norm:.4g}" if norm else "equal"
    return found
