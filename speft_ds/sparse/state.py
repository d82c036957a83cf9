"""The sparse trainable state of a rank: base values and deltas of the entries in its own shards.

After a step

    shard[index] = (base + delta).to(base dtype)

so the shards, and every weight gathered from them, always contain the deltas. Beside a base in few bits, the
values of the entries have a shard of their own: see `storage`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.sparse.layout import EntryTable, Layout, RankShards, index_dtype, locate
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.storage import InPlace, Overlay


@dataclass
class Entries:
    """Some entries of this rank's shards."""

    key: Tensor  # [n] int64, sorted; see `layout`
    base: Tensor  # [n] pretrained values in base dtype
    delta: Tensor  # [n] fp32

    @classmethod
    def merge(cls, *parts: Entries) -> Entries:
        """All entries of the parts, which have none in common."""
        key, order = torch.cat([part.key for part in parts]).sort()
        base = torch.cat([part.base for part in parts])[order]
        return cls(key, base, torch.cat([part.delta for part in parts])[order])

    def index_select(self, chosen: Tensor | slice) -> Entries:
        """Those at the chosen positions (or of a bool mask), in their order."""
        return Entries(self.key[chosen], self.base[chosen], self.delta[chosen])


def with_heads(mask: Mask, heads: dict[str, tuple[int, int]]) -> Mask:
    """The mask and, behind it, every entry of the heads."""
    if not heads:
        return mask
    index = dict(mask.index)
    device = next(iter(index.values())).device
    for name, (rows, columns) in heads.items():
        index[name] = torch.arange(rows * columns, dtype=index_dtype(rows * columns), device=device)
    return Mask(index, mask.shape | heads)


class SparseState:
    """What a rank trains: `delta`, flat over all its entries, and what it needs to write it through.

    Attributes:
        mask: the mask; `trained`: it and the heads; `heads`: as given.
        layout: of the entries of all ranks; `rank_shards`: of this rank's shards.
        index: weight -> [n] local indices of this rank's entries, heads last; `slices`: where they lie in
            the flat buffers.
        base, delta: [num_local] pretrained values and fp32 deltas.
        dropped: entries that left the mask and keep what they learnt.

    Args:
        mask: the mask, the same on every rank.
        storages: weight -> where its entries are written.
        previous: the state that this one follows: entries of both masks keep base and delta.
        revert: what becomes of entries that only `previous` has: True gives them their pretrained values
            back; False keeps what they learnt, as `dropped`.
        heads: weight -> (out, in) of what is trained in full beside the mask: a classification head.
        exact: deltas start as what the base lost when it was put into few bits, not at 0 (as LoftQ starts
            adapters; Li et al., 2023): the entries have the checkpoint's values.
    """

    def __init__(
        self,
        mask: Mask,
        storages: dict[str, InPlace | Overlay],
        previous: SparseState | None = None,
        revert: bool = False,
        heads: dict[str, tuple[int, int]] | None = None,
        exact: bool = False,
    ):
        self.mask, self.heads = mask, heads or {}
        trained = self.trained = with_heads(mask, self.heads)
        self.device = collectives.device()
        self.storages = {name: storages[name] for name in trained.shape}
        numel = {name: trained.numel(name) for name in trained.shape}
        self.rank_shards = RankShards(numel)
        rank, world_size = self.rank_shards.rank, self.rank_shards.world_size
        self.layout = Layout.of(trained.index, numel, world_size)
        self.num_local = self.layout.lengths[rank]
        self.slices = {name: self.layout.places(name, rank) for name in trained.shape}
        # Where the shards are, which may be host memory; base and delta where the optimizer is.
        local = self.rank_shards.to_local(self.rank_shards.select(trained.index))
        self.index = {name: local[name].to(self.storages[name].device) for name in trained.index}
        base = self._read(self.index)
        delta = torch.zeros(self.num_local, dtype=torch.float32, device=self.device)
        if exact:
            delta += self._read(self.index, "original").float() - base.float()
        entries = Entries(self.keys(), base, delta)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.dropped = entries.index_select(nothing)  # not a slice, which would keep all the keys alive
        if previous is not None:
            self._inherit(previous, entries, revert)
        self.base = entries.base
        self.delta = nn.Parameter(entries.delta)
        for name, storage in self.storages.items():
            storage.set_entries(trained.index[name], adds=previous is not None and not revert)
        if exact or any(isinstance(storage, Overlay) for storage in self.storages.values()):
            self._write_all()

    def keys(self) -> Tensor:
        """[num_local] int64 sorted keys of the entries."""
        return self.rank_shards.keys(self.index, self.device)

    def entries(self) -> Entries:
        """The trained entries as they are now."""
        return Entries(self.keys(), self.base, self.delta.detach())

    def modified_entries(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every entry ever trained and not reverted: weight -> [n] sorted local index, and flat deltas.

        Heads are left out: of them, every value is new.
        """
        num_of_mask = self.num_local - sum(self.index[name].numel() for name in self.heads)
        everything = Entries.merge(self.entries().index_select(slice(0, num_of_mask)), self.dropped)
        index = self.rank_shards.from_keys(everything.key)
        return {name: index[name] for name in self.mask.shape}, everything.delta

    def gather_heads(self) -> dict[str, Tensor]:
        """The heads as they are now, [out, in] in base dtype; every rank calls this."""
        gathered = {}
        for name, shape in self.heads.items():
            lengths = self.layout.counts(name)
            own = self.storages[name].shard[: lengths[self.rank_shards.rank]].to(self.device)
            gathered[name] = torch.cat(collectives.all_gather_padded(own, lengths)).view(shape)
        return gathered

    def _read(self, index: dict[str, Tensor], which: str = "pretrained") -> Tensor:
        """The values at local indices, flat, `pretrained` or `original`; see `storage`."""
        values = [getattr(self.storages[name], which)(where) for name, where in index.items()]
        return torch.cat([value.to(self.device) for value in values])

    def _write(self, index: dict[str, Tensor], values: Tensor) -> None:
        on_shards = next((storage.device for storage in self.storages.values()), values.device)
        # In one piece, where the shards are in host memory.
        parts = values.to(on_shards).split([where.numel() for where in index.values()])
        for (name, where), part in zip(index.items(), parts, strict=True):
            self.storages[name].write(where.to(on_shards), part)

    def _write_all(self) -> None:
        """Write every entry that is trained, and those that were."""
        dropped = self.dropped
        values = (dropped.base.float() + dropped.delta).to(self.base.dtype)
        self._write(self.rank_shards.from_keys(dropped.key), values)
        self.write_through()

    @torch.no_grad()
    def _inherit(self, previous: SparseState, entries: Entries, revert: bool) -> None:
        """Take over from the previous state what it knows of our entries, and its others as `dropped`."""
        known = Entries.merge(previous.entries(), previous.dropped)
        position, found = locate(known.key, entries.key)
        entries.base[found] = known.base[position[found]]
        entries.delta[found] = known.delta[position[found]]
        others = known.index_select(~locate(entries.key, known.key)[1])
        if revert:
            self._write(self.rank_shards.from_keys(others.key), others.base)
        else:
            self.dropped = others

    def own_table(self, **columns: Tensor) -> EntryTable:
        """The trained entries with these [num_local] columns."""
        return EntryTable(self.rank_shards.to_global(self.index), columns)

    def dropped_table(self) -> EntryTable:
        """The dropped entries and their deltas."""
        local = self.rank_shards.from_keys(self.dropped.key)
        return EntryTable(self.rank_shards.to_global(local), {"delta": self.dropped.delta})

    @torch.no_grad()
    def restore(self, delta: Tensor, dropped: EntryTable, all_dropped: dict[str, Tensor]) -> None:
        """Restore saved deltas, of the mask's and of dropped entries, where no other entry was trained.

        Args:
            all_dropped: weight -> [n] sorted global indices of the dropped entries of all ranks.
        """
        self.delta.copy_(delta)
        if any(index.numel() for index in all_dropped.values()):  # else no weight need be decoded
            self._restore_dropped(dropped, all_dropped)
        self._write_all()

    def _restore_dropped(self, dropped: EntryTable, all_dropped: dict[str, Tensor]) -> None:
        nothing = torch.zeros(0, dtype=torch.int64)
        index = {name: dropped.index.get(name, nothing) for name in self.storages}
        local = {name: i.to(self.device) for name, i in self.rank_shards.to_local(index).items()}
        key = self.rank_shards.keys(local, self.device)
        on_shards = {name: where.to(self.storages[name].device) for name, where in local.items()}
        self.dropped = Entries(key, self._read(on_shards), dropped.columns["delta"].to(self.device))
        for name, storage in self.storages.items():
            storage.set_entries(all_dropped.get(name, nothing), adds=True)

    @torch.no_grad()
    def write_through(self) -> None:
        """shard[index] = (base + delta).to(base dtype), in place and local."""
        self._write(self.index, (self.base.float() + self.delta).to(self.base.dtype))
