"""Attention heads and MLP channels: units of entries that meet in several weights.

Row j of a `gate_proj` and of an `up_proj` make what column j of the `down_proj` reads: channel j. The rows of
one key/value head in `k_proj` and `v_proj`, those of its query heads in `q_proj`, and the columns of the
`o_proj` that read them are a head. Query heads that share a key/value head are one unit, since its rows act
on all of them: what is trained in a unit changes nothing that another unit computes. S2FT, Yang et al., 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.model.kinds import conv1d
from speft_ds.model.kinds.target import Target
from speft_ds.model.targets import all_weights, fused_parts, layer_number
from speft_ds.selection.topk import Parts, assert_same_mask, budget_counts, require_finite
from speft_ds.sparse.layout import index_dtype
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.tiles import Tiles, fixed_point_shift, largest_score
from speft_ds.zero.shards import shard_range

# Names of a module's weights that meet in units, last the one that reads; the first list that fits counts.
MEMBERS = {
    "head": [("q_proj", "k_proj", "v_proj", reader) for reader in ("o_proj", "out_proj", "dense")],
    "channel": [
        ("gate_proj", "up_proj", "down_proj"),
        ("w1", "w3", "w2"),
        ("up_proj", "down_proj"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ],
}


@dataclass(frozen=True)
class Units:
    """The heads or the channels of one module.

    Attributes:
        bands: weight -> its rows or columns, cut into as many bands as there are units: band j is unit j's.
    """

    bands: dict[str, Tiles]

    @property
    def count(self) -> int:
        return next(iter(self.bands.values())).num_tiles

    @cached_property
    def size(self) -> int:
        """Entries of a unit."""
        return sum(band.largest for band in self.bands.values())

    @property
    def layer(self) -> int | None:
        return layer_number(next(iter(self.bands)))


def find_units(model: nn.Module, targets: Iterable[str], granularity: str) -> list[Units]:
    """The units of the targets, in model order.

    Args:
        granularity: `head` or `channel`.
    Raises:
        UserError: the model has no such units, or none in weights of their own; a weight that they meet in is
            no target.
    """
    weights, targets, found = all_weights(model), set(targets), []
    for parent in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in weights):
        lists = ([f"{parent}.{part}.weight" for part in parts] for parts in MEMBERS[granularity])
        names = next((names for names in lists if all(name in weights for name in names)), [])
        if targets.isdisjoint(names):
            continue
        if missing := [name for name in names if name not in targets]:
            what = f"the {granularity}s of {parent} meet in {missing[0]}, too, which is no target"
            parts = ",".join(name.split(".")[-2] for name in names)
            raise UserError(what, "mask.targets", f"mask.targets=[{parts}], or mask.targets=null")
        members = {name: weights[name] for name in names}
        found.append(_cut(members, granularity, model.config.get_text_config()))
    if not found:
        parts = {name.removesuffix(".weight").split(".")[-1] for name in weights}
        named = ", ".join(fused_parts(part) for part in sorted(parts))
        what = f"{type(model).__name__} has no {granularity}s in weights of their own; it has {named}"
        raise UserError(what, "mask.granularity", "mask.granularity=row")
    return found


def in_units(model: nn.Module, targets: dict[str, Target], granularity: str) -> dict[str, Target]:
    """The targets that have units: a density is one of these. Raises UserError as `find_units` does."""
    names = {name for units in find_units(model, targets, granularity) for name in units.bands}
    return {name: target for name, target in targets.items() if name in names}


def _cut(members: dict[str, Target], granularity: str, config) -> Units:
    """The units of one module.

    Args:
        members: weight -> target, the one that reads last.
        config: of the model.
    Raises:
        UserError: the sizes of the weights do not go together.
    """
    reader, bands = list(members)[-1], {}
    # Outputs of the weights that write, inputs of the one that reads: rows or columns, as they are stored.
    sides = {name: int((name == reader) != (target.kind is conv1d)) for name, target in members.items()}
    lengths = {name: target.shape[sides[name]] for name, target in members.items()}
    if granularity == "head":
        heads = config.num_attention_heads
        count = getattr(config, "num_key_value_heads", None) or heads
        query, key, value, read = lengths.values()
        is_apart = query * count != key * heads or read * count != value * heads
        is_apart = is_apart or any(length % count for length in lengths.values())
    else:
        count = lengths[reader]
        is_apart = len(set(lengths.values())) > 1
    if is_apart:
        sizes = ", ".join(f"{name.split('.')[-2]} {length}" for name, length in lengths.items())
        what = f"the sizes of {reader} and what it reads are not those of {granularity}s: {sizes}"
        raise UserError(what, "mask.granularity", "mask.granularity=row")
    for name, target in members.items():
        (rows, columns), width = target.shape, lengths[name] // count
        bands[name] = Tiles(target.shape, *((rows, width) if sides[name] else (width, columns)))
    return Units(bands)


def select_units(
    scores: dict[str, Tensor],
    units: list[Units],
    shape: dict[str, tuple[int, int]],
    num_trainable: int,
    budget: str,
) -> Mask:
    """The best units, equal ones in model order; as `topk.select`.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard; those in no unit do not count.
        budget: `global`, or `per_layer`: each decoder layer its share.
    """
    require_finite(scores)
    sizes = torch.tensor([each.size for each in units for _ in range(each.count)])
    means = _sums(scores, units).cpu().double() / sizes  # the scale does not matter
    elements = {layer: count for layer, (_, count) in by_layer(units).items()}
    group, counts = budget_counts(elements, budget, num_trainable)
    numbers = torch.tensor([group[each.layer] for each in units for _ in range(each.count)])
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    for number, count in enumerate(counts):
        own = (numbers == number).nonzero()[:, 0]
        order = own[means[own].sort(descending=True, stable=True).indices]
        chosen[order[sizes[order].cumsum(0) <= count]] = True
    dtype = index_dtype(max(rows * columns for rows, columns in shape.values()))
    index = {name: torch.empty(0, dtype=dtype, device=collectives.device()) for name in shape}
    for each, own in zip(units, chosen.split([each.count for each in units]), strict=True):
        bands = own.nonzero()[:, 0].to(collectives.device())
        index |= {name: tiles.entries(bands).to(dtype) for name, tiles in each.bands.items()}
    return assert_same_mask(Mask(index, shape))


def _sums(scores: dict[str, Tensor], units: list[Units]) -> Tensor:
    """[units] int64 the sum of each one's scores over all weights and ranks, in one unknown fixed point.

    The same on every rank and at every world size.
    """
    shift = fixed_point_shift(largest_score(scores), max(each.size for each in units))
    rank, world_size = collectives.rank(), collectives.world_size()
    sums = []
    for each in units:
        total = torch.zeros(each.count, dtype=torch.int64, device=collectives.device())
        for name, tiles in each.bands.items():
            start, stop = shard_range(tiles.shape[0] * tiles.shape[1], rank, world_size)
            fixed = (scores[name].double() * 2.0**shift).round().to(total)
            total.index_add_(0, tiles.tile_of(torch.arange(start, stop, device=total.device)), fixed)
        sums.append(total)
    return collectives.all_reduce(torch.cat(sums))


def parts_of(units: list[Units] | None) -> Parts | None:
    """What `topk.min_trainable` wants to know of units; None where there are none."""
    return None if units is None else by_layer(units).values()


def by_layer(units: list[Units]) -> dict[int | None, tuple[int, int]]:
    """Decoder layer -> entries of its largest unit, and of all its units."""
    sizes: dict[int | None, tuple[int, int]] = {}
    for each in units:
        largest, total = sizes.get(each.layer, (0, 0))
        sizes[each.layer] = (max(largest, each.size), total + each.count * each.size)
    return sizes
