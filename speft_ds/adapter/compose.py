"""Several adapters of one base as one: the union of their entries, weighted sums of their deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speft_ds.adapter.derive import (
    Entries,
    check_output,
    check_same_base,
    history,
    no_entries,
    open_adapter,
    write_derived,
)
from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError

# Facts that a composed adapter takes over; the recipes are those of its sources alone.
KEPT = ("base", "dtype", "fingerprint", "fingerprint_bfloat16", "task")
OF_A_HEAD = ("task", "classes", "pad_token_id", "row_ends_with_eos")


@dataclass
class Collisions:
    """Where composed adapters meet.

    Attributes:
        num_entries: of the result.
        num_shared: entries that two or more of the adapters have.
        num_opposite: of these, those that are to rise by one adapter and to fall by another (a negative
            weight turns an adapter around).
    """

    num_entries: int = 0
    num_shared: int = 0
    num_opposite: int = 0

    def add(self, other: Collisions) -> None:
        self.num_entries += other.num_entries
        self.num_shared += other.num_shared
        self.num_opposite += other.num_opposite


def add_entries(parts: Sequence[Entries], weights: Sequence[float]) -> tuple[Entries, Collisions]:
    """The weighted sum of entries of one weight, in fp32 and in the order of the parts."""
    if not parts:
        return no_entries(), Collisions()
    index, position = torch.cat([index for index, _ in parts]).unique(return_inverse=True)
    weighted = torch.cat([delta * weight for (_, delta), weight in zip(parts, weights, strict=True)])
    delta = torch.zeros(index.numel()).index_add_(0, position, weighted)
    rises, falls = torch.zeros(2, index.numel(), dtype=torch.bool)
    rises[position[weighted > 0]] = True
    falls[position[weighted < 0]] = True
    num_shared = int((torch.bincount(position) > 1).sum())
    return (index, delta), Collisions(index.numel(), num_shared, int((rises & falls).sum()))


def compose(
    sources: Sequence[str | Path], output: str | Path, weights: Sequence[float] | None = None
) -> Collisions:
    """Write the weighted sum of adapters of one base. A classifier's head is kept as it is.

    Args:
        sources: two or more adapters, or folders of runs.
        output: the new adapter's folder.
        weights: what each adapter's deltas are multiplied by; None: 1.
    Raises:
        UserError: fewer than two adapters, another number of weights, different bases, two heads, or an
            adapter that cannot be read or written.
    """
    adapters = [open_adapter(source) for source in sources]
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights)
    check_output(output)
    met = Collisions()

    def entries(name: str) -> Entries:
        having = [number for number, adapter in enumerate(adapters) if name in adapter.shape]
        parts = [adapters[number].entries(name) for number in having]
        total, own = add_entries(parts, [weights[number] for number in having])
        met.add(own)
        return total

    heads = {name: adapter.head(name) for adapter in adapters for name in adapter.heads}
    write_derived(output, _facts(adapters, weights, met), entries, heads)
    return met


def _facts(adapters: list[Adapter], weights: list[float], met: Collisions) -> dict:
    facts = {key: adapters[0].facts[key] for key in KEPT if key in adapters[0].facts}
    for adapter in adapters:
        if adapter.heads:
            facts |= {key: adapter.facts[key] for key in OF_A_HEAD if key in adapter.facts}
    facts["shapes"] = {name: shape for adapter in adapters for name, shape in adapter.facts["shapes"].items()}
    facts["history"] = history(adapters, {"command": "compose", "weights": weights})
    return facts


def _check(adapters: list[Adapter], weights: list[float]) -> None:
    fix = "speft compose A B OUTPUT --weights 1.0,0.5"
    if len(adapters) < 2:
        raise UserError("one adapter has nothing to be composed with", "compose", fix)
    if len(weights) != len(adapters):
        what = f"there are {len(adapters)} adapters and {len(weights)} weights"
        raise UserError(what, "--weights", f"a weight for each: {fix}")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"the weights are {weights}", "--weights", "finite numbers")
    check_same_base(adapters)
    if len(with_head := [str(adapter.folder) for adapter in adapters if adapter.heads]) > 1:
        raise UserError(
            "more than one adapter has a classifier's head: heads cannot be added",
            where=" and ".join(with_head),
            fix="compose one classifier with adapters of language models",
        )
