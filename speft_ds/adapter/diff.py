"""What sets two adapters of one base apart: entries that only one has, deltas that differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from speft_ds.adapter.derive import Entries, check_same_base, no_entries
from speft_ds.adapter.format import Adapter


@dataclass
class Difference:
    """Counts and sums over the entries of two adapters, A and B, of one weight or of many.

    Attributes:
        only_a, only_b: entries that one alone has; equal, differing: entries of both, by their deltas.
        opposite: of those that differ, the ones with opposite signs.
        squares_a, squares_b, squares_apart: sums of squared deltas, of A, of B and of A - B, where an entry
            that is not there counts as 0.
        product: sum of the products of the deltas of A and B.
    """

    only_a: int = 0
    only_b: int = 0
    equal: int = 0
    differing: int = 0
    opposite: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_apart: float = 0.0
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


def compare_entries(a: Entries, b: Entries) -> Difference:
    """The entries of one weight in two adapters."""
    index, position = torch.cat([a[0], b[0]]).unique(return_inverse=True)
    of_a, of_b = position[: len(a[0])], position[len(a[0]) :]
    delta = torch.zeros(2, index.numel(), dtype=torch.float64)
    is_there = torch.zeros(2, index.numel(), dtype=torch.bool)
    delta[0, of_a], delta[1, of_b] = a[1].double(), b[1].double()
    is_there[0, of_a] = is_there[1, of_b] = True
    both, equal = is_there.all(0), delta[0] == delta[1]
    return Difference(
        only_a=int((is_there[0] & ~both).sum()),
        only_b=int((is_there[1] & ~both).sum()),
        equal=int((both & equal).sum()),
        differing=int((both & ~equal).sum()),
        opposite=int((delta[0] * delta[1] < 0).sum()),
        squares_a=float(delta[0].square().sum()),
        squares_b=float(delta[1].square().sum()),
        squares_apart=float((delta[0] - delta[1]).square().sum()),
        product=float((delta[0] * delta[1]).sum()),
    )


def total(differences: list[Difference]) -> Difference:
    """Of several weights together."""
    return Difference(*(sum(getattr(one, field.name) for one in differences) for field in fields(Difference)))


def diff(a: Adapter, b: Adapter | None) -> dict[str, Difference]:
    """Weight name -> difference of its entries, for all weights that either adapter has entries of.

    Args:
        b: None to compare with the base, that is, with no entries.
    Raises:
        UserError: the adapters are of different bases, or damaged.
    """
    if b is not None:
        check_same_base([a, b])
    names = dict.fromkeys([*a.names, *(b.names if b else [])])
    return {name: compare_entries(_entries(a, name), _entries(b, name)) for name in names}


def diff_heads(a: Adapter, b: Adapter | None) -> dict[str, str]:
    """Name of a head -> what sets the two apart: where it is missing, or how far it differs."""
    said = {}
    for name in dict.fromkeys([*a.heads, *(b.heads if b else [])]):
        there = [adapter for adapter in (a, b) if adapter is not None and name in adapter.heads]
        values = [adapter.head(name).float() for adapter in there]
        if len(there) == 1:
            said[name] = f"only in {there[0].folder}"
        elif values[0].shape != values[1].shape:
            said[name] = f"of shape {tuple(values[0].shape)} and {tuple(values[1].shape)}"
        else:
            apart = float((values[0] - values[1]).norm())
            said[name] = f"differs, norm {apart:.4g}" if apart else "equal"
    return said


def _entries(adapter: Adapter | None, name: str) -> Entries:
    return adapter.entries(name) if adapter is not None and name in adapter.shape else no_entries()
