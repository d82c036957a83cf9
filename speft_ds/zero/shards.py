"""Who owns which entry of a weight: pure index arithmetic, no communication.

ZeRO-3 cuts a weight of `numel` elements into `world_size` flat shards of equal length (the last ones
padded). An entry belongs to the rank whose shard holds it:

    owner = global_index // shard_numel        local_index = global_index - owner * shard_numel
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

INT32_ELEMENTS = 2**31


def index_dtype(numel: int) -> torch.dtype:
    """int32 where a flat index into `numel` elements fits, else int64."""
    return torch.int32 if numel < INT32_ELEMENTS else torch.int64


def shard_numel(numel: int, world_size: int) -> int:
    """Elements in one rank's shard of a weight, padding included (DeepSpeed's rule: rounded up)."""
    return -(-numel // world_size)


def shard_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the global flat indices that `rank` owns; empty where the shard is all padding."""
    size = shard_numel(numel, world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def owner_bounds(index: Tensor, numel: int, world_size: int) -> list[int]:
    """Where each rank's entries start in a sorted global index.

    Args:
        index: [k] sorted global flat indices into a weight of `numel` elements.
    Returns:
        world_size + 1 positions; rank r owns index[bounds[r]:bounds[r + 1]].
    """
    starts = [shard_range(numel, rank, world_size)[0] for rank in range(world_size)] + [numel]
    edges = torch.tensor(starts, dtype=torch.int64, device=index.device)
    return torch.searchsorted(index.to(torch.int64), edges).tolist()


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
    """Where the entries of every weight lie in the flat buffers of every rank.

    A rank's flat buffers hold its entries weight by weight (in the mask's order), sorted within a weight.
    """

    bounds: dict[str, list[int]]  # weight -> owner_bounds
    offsets: dict[str, list[int]]  # weight -> start of its slice in the flat buffer of each rank
    lengths: list[int]  # entries that each rank owns, over all weights
    numel: dict[str, int]  # weight -> its elements

    @classmethod
    def of(cls, index: dict[str, Tensor], numel: dict[str, int], world_size: int) -> Layout:
        lengths = [0] * world_size
        bounds, offsets = {}, {}
        for name, positions in index.items():
            bounds[name] = owner_bounds(positions, numel[name], world_size)
            offsets[name] = list(lengths)
            for rank, (start, stop) in enumerate(pairwise(bounds[name])):
                lengths[rank] += stop - start
        return cls(bounds, offsets, lengths, numel)

    def counts(self, name: str) -> list[int]:
        """Entries of this weight that each rank owns."""
        return [stop - start for start, stop in pairwise(self.bounds[name])]

    def local_slice(self, name: str, rank: int) -> slice:
        """This weight's slice of the flat buffers of `rank`."""
        start = self.offsets[name][rank]
        return slice(start, start + self.counts(name)[rank])

    def local_index(self, name: str, index: Tensor, rank: int) -> Tensor:
        """The entries of `rank` among a weight's [k] global indices, counted from the start of its shard."""
        own = index[self.bounds[name][rank] : self.bounds[name][rank + 1]]
        return own - shard_range(self.numel[name], rank, len(self.lengths))[0]
