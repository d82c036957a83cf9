"""The trainable state of one rank.

Each rank holds, for the entries in its own shards only, flat `base` and `delta` buffers. After a step

    shard[index] = (base + delta).to(base dtype)

so the shards, and every weight gathered from them, always contain the deltas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.sparse.gradient import GradientOptions, SparseGradient
from speft_ds.sparse.layout import EntryTable, index_dtype, locate
from speft_ds.sparse.mask import Mask
from speft_ds.zero.shards import shard_range


@dataclass
class Entries:
    """Some entries of this rank's shards: sorted keys (see `SparseState.keys`), pretrained values, deltas."""

    key: Tensor  # [n] int64
    base: Tensor  # [n] base dtype
    delta: Tensor  # [n] fp32

    @classmethod
    def merge(cls, *pieces: Entries) -> Entries:
        """All entries of the pieces, which have none in common."""
        key, order = torch.cat([piece.key for piece in pieces]).sort()
        base = torch.cat([piece.base for piece in pieces])[order]
        return cls(key, base, torch.cat([piece.delta for piece in pieces])[order])

    def pick(self, chosen: Tensor) -> Entries:
        """Those at the chosen positions (or of a bool mask), in their order."""
        return Entries(self.key[chosen], self.base[chosen], self.delta[chosen])


def with_heads(mask: Mask, heads: dict[str, tuple[int, int]]) -> Mask:
    """The mask and, behind it, every entry of the heads."""
    everything = {name: torch.arange(rows * columns) for name, (rows, columns) in heads.items()}
    device = next(iter(mask.index.values())).device
    index = {name: i.to(device, index_dtype(i.numel())) for name, i in everything.items()}
    return Mask(mask.index | index, mask.shape | heads) if heads else mask


class SparseState:
    """What one rank trains: `delta`, flat over all its entries, and what it needs to write it through.

    Attributes:
        mask: the mask; `trained`: it and the heads; `heads`: as given.
        index: weight -> [n] local indices of this rank's entries, heads last; `slices`: where they lie in
            the flat buffers.

    Args:
        mask: the mask, the same on every rank.
        heads: weight -> (out, in) of what is trained whole beside the mask: a classification head.
        shards: weight -> this rank's ZeRO-3 shard [shard_numel], written in place.
        options: of the gradient.
        previous: the state that this one follows: entries of both masks keep base and delta.
        revert: what becomes of entries that only `previous` has: True gives them their pretrained values
            back; False keeps what they learnt, as `dropped`.
    """

    def __init__(
        self,
        mask: Mask,
        shards: dict[str, Tensor],
        options: GradientOptions,
        previous: SparseState | None = None,
        revert: bool = False,
        heads: dict[str, tuple[int, int]] | None = None,
    ):
        self.mask, self.heads = mask, heads or {}
        mask = self.trained = with_heads(mask, self.heads)
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.device = collectives.device()
        self.shards = {name: shards[name] for name in mask.shape}
        self.gradient = SparseGradient(mask, self.device, options)
        self.layout = self.gradient.layout
        self.slices = {name: self.layout.places(name, self.rank) for name in mask.shape}
        # Where the shards are, which may be host memory; base and delta where the optimizer is.
        local = self.gradient.local_index()
        self.index = {name: index.to(self.shards[name].device) for name, index in local.items()}
        zeros = torch.zeros(self.num_local, dtype=torch.float32, device=self.device)
        entries = Entries(self.keys(), self._read(self.index), zeros)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.dropped = entries.pick(nothing)  # not a slice, which would keep all the keys alive
        if previous is not None:
            self._follow(previous, entries, revert)
        self.base = entries.base
        self.delta = nn.Parameter(entries.delta)

    @property
    def num_local(self) -> int:
        """Entries that this rank owns."""
        return self.layout.lengths[self.rank]

    def keys(self) -> Tensor:
        """[num_local] int64 sorted: the entries' positions in this rank's shards laid end to end."""
        return torch.cat(
            [self.index[name].to(self.device, torch.int64) + start for name, start in self.starts().items()]
        )

    def starts(self) -> dict[str, int]:
        """Weight -> where its shard starts when this rank's shards are laid end to end."""
        starts, total = {}, 0
        for name, shard in self.shards.items():
            starts[name] = total
            total += shard.numel()
        return starts

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Weight -> [start, stop) of the global flat indices in this rank's shard."""
        return spans_of({name: self.trained.numel(name) for name in self.trained.shape})

    def entries(self) -> Entries:
        """The trained entries as they are now."""
        return Entries(self.keys(), self.base, self.delta.detach())

    def touched(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every entry ever trained and not reverted: weight -> [n] sorted local index, and flat deltas.

        Heads are left out: of them, every value is new.
        """
        own = self.entries().pick(slice(0, self.num_local - sum(self.index[n].numel() for n in self.heads)))
        everything = Entries.merge(own, self.dropped)
        index = self._by_weight(everything.key)
        return {name: index[name] for name in self.mask.shape}, everything.delta

    def whole_heads(self) -> dict[str, Tensor]:
        """The heads as they are now, [out, in] in base dtype; every rank calls this."""
        whole = {}
        for name, shape in self.heads.items():
            ranges = [
                shard_range(self.trained.numel(name), r, self.world_size) for r in range(self.world_size)
            ]
            lengths = [stop - start for start, stop in ranges]
            own = self.shards[name][: lengths[self.rank]].to(self.device)
            whole[name] = torch.cat(collectives.all_gather_padded(own, lengths)).view(shape)
        return whole

    def _by_weight(self, key: Tensor) -> dict[str, Tensor]:
        """Sorted keys -> weight -> local index into its shard."""
        starts = self.starts()
        edges = torch.searchsorted(key, torch.tensor([*starts.values()], device=key.device)).tolist()
        pieces = zip(starts.items(), edges, [*edges[1:], key.numel()], strict=True)
        return {name: key[first:last] - start for (name, start), first, last in pieces}

    def _read(self, index: dict[str, Tensor]) -> Tensor:
        """The shards' values at local indices, flat."""
        shards = self.shards
        values = [shards[name][where.to(shards[name].device)] for name, where in index.items()]
        return torch.cat(values).to(self.device)

    def _write(self, index: dict[str, Tensor], values: Tensor) -> None:
        pieces = values.split([where.numel() for where in index.values()])
        for (name, where), piece in zip(index.items(), pieces, strict=True):
            shard = self.shards[name]
            shard[where.to(shard.device)] = piece.to(shard.device)

    @torch.no_grad()
    def _follow(self, previous: SparseState, entries: Entries, revert: bool) -> None:
        """Take over from the previous state what it knows of our entries, and its others as `dropped`."""
        known = Entries.merge(previous.entries(), previous.dropped)
        position, found = locate(known.key, entries.key)
        entries.base[found] = known.base[position[found]]
        entries.delta[found] = known.delta[position[found]]
        others = known.pick(~locate(entries.key, known.key)[1])
        if revert:
            self._write(self._by_weight(others.key), others.base)
        else:
            self.dropped = others

    def own_table(self, **columns: Tensor) -> EntryTable:
        """The trained entries in global coordinates, with these [num_local] columns."""
        return EntryTable(to_global(self.index, self.spans), columns)

    def dropped_table(self) -> EntryTable:
        """The dropped entries and their deltas, in global coordinates."""
        index = to_global(self._by_weight(self.dropped.key), self.spans)
        return EntryTable(index, {"delta": self.dropped.delta})

    @torch.no_grad()
    def restore(self, delta: Tensor, dropped: EntryTable) -> None:
        """Take up saved deltas, of the mask's and of dropped entries; the shards hold pretrained values."""
        self.delta.copy_(delta)
        starts, spans = self.starts(), self.spans
        keys = [starts[name] + index - spans[name][0] for name, index in dropped.index.items()]
        key = torch.cat(keys).to(self.device, torch.int64)
        delta = dropped.columns["delta"].to(self.device)
        local = self._by_weight(key)
        self.dropped = Entries(key, self._read(local), delta)
        self._write(local, (self.dropped.base.float() + delta).to(self.base.dtype))
        self.write_through()

    @torch.no_grad()
    def write_through(self) -> None:
        """shard[index] = (base + delta).to(base dtype), in place and local."""
        self._write(self.index, (self.base.float() + self.delta).to(self.base.dtype))


def spans_of(numel: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Weight -> [start, stop) of the global flat indices that are this rank's."""
    rank, world_size = collectives.rank(), collectives.world_size()
    return {name: shard_range(count, rank, world_size) for name, count in numel.items()}


def to_global(index: dict[str, Tensor], spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Local indices into this rank's shards, as flat indices into the whole weights."""
    return {name: local + spans[name][0] for name, local in index.items()}
