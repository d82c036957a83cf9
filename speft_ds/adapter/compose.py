"""Several adapters of one base as one: the union of their entries, weighted sums of their deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speft_ds.adapter.apply import check_same_base
from speft_ds.adapter.format import Adapter, Entries, open_adapter
from speft_ds.adapter.save import check_output, history, write_derived
from speft_ds.errors import UserError

# Facts that a composed adapter takes over; the recipes are those of its sources alone.
KEPT = (
    *("base", "dtype", "fingerprint", "fingerprint_bfloat16", "task", "base_format", "quantised", "start"),
    *("new_tokens", "vocabulary"),
)
OF_A_HEAD = ("task", "classes", "pad_token_id", "row_ends_with_eos")


@dataclass
class Collisions:
    """Where composed adapters meet.

    Attributes:
        num_entries: of the result.
        num_shared: entries that two or more of the adapters have.
        num_opposite: of these, those that rise by one adapter and fall by another, after the weights.
    """

    num_entries: int = 0
    num_shared: int = 0
    num_opposite: int = 0


def compose(
    sources: Sequence[str | Path], output: str | Path, weights: Sequence[float] | None = None
) -> Collisions:
    """Write the weighted sum of adapters of one base. What one has whole is kept as it is.

    Args:
        sources: two or more adapters, or folders of runs.
        output: the new adapter's folder.
        weights: what each adapter's deltas are multiplied by; None: 1.
    Raises:
        UserError: fewer than two adapters, another number of weights, different bases, whole weights that
            another changes, too, or an adapter that cannot be read or written.
    """
    adapters = [open_adapter(source) for source in sources]
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights)
    check_output(output)
    facts = {key: adapters[0].facts[key] for key in KEPT if key in adapters[0].facts}
    whole = {}
    for adapter in adapters:
        if adapter.whole:
            facts |= {key: adapter.facts[key] for key in OF_A_HEAD if key in adapter.facts}
            whole = {name: adapter.value(name) for name in adapter.whole}
    facts["shapes"] = {name: shape for adapter in adapters for name, shape in adapter.facts["shapes"].items()}
    facts["history"] = history(adapters, {"command": "compose", "weights": weights})
    collisions = Collisions()

    def weighted_sum(name: str) -> Entries:
        return _weighted_sum([adapter.entries(name) for adapter in adapters], weights, collisions)

    write_derived(output, facts, weighted_sum, whole, tokenizer=adapters[0].tokenizer)
    return collisions


def _weighted_sum(parts: Sequence[Entries], weights: Sequence[float], collisions: Collisions) -> Entries:
    """The entries of one weight, summed in fp32 and in the order of the parts; counts where they meet."""
    index, position = torch.cat([index for index, _ in parts]).unique(return_inverse=True)
    weighted = torch.cat([delta * weight for (_, delta), weight in zip(parts, weights, strict=True)])
    rises, falls = torch.zeros(2, index.numel(), dtype=torch.bool)
    rises[position[weighted > 0]] = True
    falls[position[weighted < 0]] = True
    collisions.num_entries += index.numel()
    collisions.num_shared += int((torch.bincount(position) > 1).sum())
    collisions.num_opposite += int((rises & falls).sum())
    return index, torch.zeros(index.numel()).index_add_(0, position, weighted)


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
    if exact := [str(adapter.folder) for adapter in adapters if adapter.facts.get("start") == "exact"]:
        what = "deltas that start exact have in them what the base lost, which a sum has more than once"
        raise UserError(what, " and ".join(exact), "train with mask.start=zero what is to be composed")
    with_whole = [str(adapter.folder) for adapter in adapters if adapter.whole]
    if len(with_whole) > 1:
        what = "more than one adapter has weights that were trained whole (a classifier's head is one)"
        fix = "compose one of them with adapters of entries alone"
        raise UserError(what, " and ".join(with_whole), fix)
    for adapter in adapters:
        if both := [name for other in adapters for name in other.names if name in adapter.whole]:
            what = f"{both[0]} was trained whole in one adapter, and has entries in another"
            raise UserError(what, str(adapter.folder), "merge one, and train the other on the result")
