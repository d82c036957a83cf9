"""Coordinates of the mask's entries, and every conversion between them.

An entry has five coordinates. Two ranks, one weight of 10 elements (shards of 5) with five entries, whose
shards start at key 100 and whose slices of the flat buffers start at place 7:

                                                               rank 0   |    rank 1
    global index   flat index into the weight                  1   4    |   5   8   9
    local index    flat index into the owner's shard           1   4    |   0   3   4
    key            position in all shards of a rank,
                   laid end to end                            101 104   |  100 103 104
    place          position in the flat buffers of a rank      7   8    |   7   8   9
    kernel order   position among the entries of the weight,
                   over all ranks                              0   1    |   2   3   4

`mask.index` holds global indices, `SparseState.index` local ones. Keys compare entries of two masks. Deltas,
base values, gradients and moments lie at their places; a kernel returns gradients in kernel order.

A weight that is trained whole has no index: every rank owns all of its shard. Whole weights lie behind the
entries of the mask.

    global index -> local index   RankShards.select, RankShards.to_local
    local index  -> global index  RankShards.to_global
    local index <-> key           RankShards.keys, RankShards.from_keys
    weight       -> places        Layout.places
    kernel order -> ranks         Layout.counts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.zero.shards import shard_numel, shard_range

INT32_ELEMENTS = 2**31


def index_dtype(numel: int) -> torch.dtype:
    """int32 where a flat index into `numel` elements fits, else int64."""
    return torch.int32 if numel < INT32_ELEMENTS else torch.int64


def locate(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted key stands in sorted keys without repeats.

    Returns:
        [n] int64 positions, meaningful where the [n] bool says that the key is there.
    """
    if keys.numel() == 0:
        return torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(wanted, dtype=torch.bool)
    position = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
    return position, keys[position] == wanted


@dataclass(frozen=True)
class Layout:
    """Which entries of a mask each rank owns, and where they lie in its flat buffers.

    A rank's flat buffers hold its entries weight by weight (in the order of `index`), sorted within a weight.
    """

    bounds: dict[str, list[int]]  # weight -> edges: rank r owns index[edges[r] : edges[r + 1]]
    offsets: dict[str, list[int]]  # weight -> start of its slice in the flat buffers of each rank
    lengths: list[int]  # entries that each rank owns, over all weights

    @classmethod
    def of(cls, index: dict[str, Tensor | None], numel: dict[str, int], world_size: int) -> Layout:
        """The layout of weight -> [k] sorted global flat indices; None: all of the weight."""
        lengths = [0] * world_size
        bounds, offsets = {}, {}
        for name, positions in index.items():
            edges = [shard_range(numel[name], rank, world_size)[0] for rank in range(world_size)]
            edges.append(numel[name])
            if positions is not None:
                cuts = torch.tensor(edges, dtype=torch.int64, device=positions.device)
                edges = torch.searchsorted(positions.to(torch.int64), cuts).tolist()
            bounds[name] = edges
            offsets[name] = list(lengths)
            for rank, (start, stop) in enumerate(pairwise(bounds[name])):
                lengths[rank] += stop - start
        return cls(bounds, offsets, lengths)

    def counts(self, name: str) -> list[int]:
        """Entries of this weight that each rank owns: how its kernel order is cut."""
        return [stop - start for start, stop in pairwise(self.bounds[name])]

    def places(self, name: str, rank: int) -> slice:
        """This weight's slice of the flat buffers of `rank`."""
        start = self.offsets[name][rank]
        return slice(start, start + self.counts(name)[rank])


@dataclass(frozen=True)
class RankShards:
    """This rank's shards of some weights, laid end to end in the order of `numel`."""

    numel: dict[str, int]  # weight -> its elements
    rank: int = field(default_factory=collectives.rank)
    world_size: int = field(default_factory=collectives.world_size)

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Weight -> [start, stop) of the global indices in this rank's shard."""
        return {name: shard_range(count, self.rank, self.world_size) for name, count in self.numel.items()}

    @cached_property
    def starts(self) -> dict[str, int]:
        """Weight -> the key at which its shard starts."""
        lengths = [shard_numel(count, self.world_size) for count in self.numel.values()]
        return dict(zip(self.numel, accumulate(lengths, initial=0), strict=False))  # the last is the end

    def keys(self, local: dict[str, Tensor], device: torch.device) -> Tensor:
        """[n] sorted int64 keys of sorted local indices of all weights."""
        own = [local[name].to(device, torch.int64) + start for name, start in self.starts.items()]
        return torch.cat(own) if own else torch.empty(0, dtype=torch.int64, device=device)

    def from_keys(self, key: Tensor) -> dict[str, Tensor]:
        """Sorted keys -> weight -> local indices."""
        starts = torch.tensor([*self.starts.values()], dtype=torch.int64, device=key.device)
        edges = torch.searchsorted(key, starts).tolist()
        pieces = zip(self.starts.items(), edges, [*edges, key.numel()][1:], strict=True)
        return {name: key[first:last] - start for (name, start), first, last in pieces}

    def to_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Local indices -> global ones."""
        return {name: index + self.spans[name][0] for name, index in local.items()}

    def to_local(self, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """Global indices in this rank's shards -> local ones."""
        return {name: found - self.spans[name][0] for name, found in index.items()}

    def select(self, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of sorted global indices that lie in this rank's shards, still global."""
        own = {}
        for name, (start, stop) in self.spans.items():
            edges = torch.tensor([start, stop], device=index[name].device)
            first, last = torch.searchsorted(index[name].to(torch.int64), edges).tolist()
            own[name] = index[name][first:last]
        return own


@dataclass
class ShardTable:
    """Values of all elements in this rank's shards of some weights."""

    counts: dict[str, int]  # weight -> elements
    columns: dict[str, Tensor]  # name -> [sum of counts] values, weight by weight


@dataclass
class EntryTable:
    """Values at some entries of some weights, in global coordinates."""

    index: dict[str, Tensor]  # weight -> [n] sorted global indices
    columns: dict[str, Tensor] = field(default_factory=dict)  # name -> [sum of n] values, weight by weight
