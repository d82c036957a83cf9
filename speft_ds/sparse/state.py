"""What a rank trains of its own shards: entries of some weights, and all of others.

After a step

    shard[index] = (base + delta).to(base dtype)      of the mask's entries
    shard = value.to(base dtype)                      of a weight that is trained whole

so the shards, and every weight gathered from them, always contain what was learnt. Beside a base in few bits,
the values of the entries have a shard of their own: see `storage`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.sparse.layout import EntryTable, Layout, RankShards, ShardTable, locate
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.storage import InPlace, NewRows, Overlay
from speft_ds.zero.shards import full_shape


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


def spans_of(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Weight -> (rows, columns) -> weight -> [start, stop) of the flat indices in this rank's shard."""
    return RankShards({name: rows * columns for name, (rows, columns) in shapes.items()}).spans


class SparseState:
    """What a rank trains: `delta`, flat over all its entries, and what it needs to write it through.

    Attributes:
        mask, whole: as given.
        layout: of all that is trained, of all ranks; whole weights lie behind the mask's entries.
        rank_shards: of this rank's shards of the mask's weights.
        index: weight of the mask -> [n] local indices of this rank's entries.
        slices: weight -> where its entries, or its shard, lie in the flat buffers.
        num_entries: of the mask, on this rank; `num_local`: with all elements of whole weights.
        base: [num_entries] pretrained values.
        delta: [num_local] fp32, what the optimizer sees: the deltas of the entries, then the values of whole
            weights (so weight decay pulls these to 0, as other trainers do).
        dropped: entries that left the mask and keep what they learnt.
        closed: weight -> its matrix' shape, of those that were trained whole before and are not now.

    Args:
        mask: the mask, the same on every rank.
        storages: weight -> where its entries are written.
        previous: the state that this one follows: entries of both masks keep base and delta.
        revert: what becomes of entries that only `previous` has: True gives them their pretrained values
            back; False keeps what they learnt, as `dropped`.
        whole: weight -> its matrix' shape: what is trained whole beside the mask. One that `previous` has,
            too, keeps its fp32 values; of others these are made of the shards.
        exact: deltas start as what the base lost when it was put into few bits, not at 0 (as LoftQ starts
            adapters; Li et al., 2023): the entries have the checkpoint's values.
            Those in new rows always start so.
    """

    def __init__(
        self,
        mask: Mask,
        storages: dict[str, InPlace | Overlay],
        previous: SparseState | None = None,
        revert: bool = False,
        whole: dict[str, tuple[int, int]] | None = None,
        exact: bool = False,
    ):
        self.mask, self.whole = mask, whole or {}
        self.device = collectives.device()
        self.storages = {name: storages[name] for name in mask.shape | self.whole}
        numel = {name: rows * columns for name, (rows, columns) in (mask.shape | self.whole).items()}
        self.rank_shards = RankShards({name: numel[name] for name in mask.shape})
        rank, world_size = collectives.rank(), collectives.world_size()
        self.layout = Layout.of(mask.index | dict.fromkeys(self.whole), numel, world_size)
        self.num_local = self.layout.lengths[rank]
        self.slices = {name: self.layout.places(name, rank) for name in numel}
        # Where the shards are, which may be host memory; base and delta where the optimizer is.
        local = self.rank_shards.to_local(self.rank_shards.select(mask.index))
        self.index = {name: local[name].to(self.storages[name].device) for name in mask.index}
        self.num_entries = sum(index.numel() for index in self.index.values())
        base = self._read(self.index)
        delta = torch.zeros(self.num_entries, dtype=torch.float32, device=self.device)
        if previous is None:
            for name, where in self.index.items():
                if exact or isinstance(self.storages[name], NewRows):
                    own = self.slices[name]
                    delta[own] = self.storages[name].original(where).to(self.device).float() - base[own]
        entries = Entries(self.keys(), base, delta)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.dropped = entries.index_select(nothing)  # not a slice, which would keep all the keys alive
        if previous is not None:
            self._inherit(previous, entries, revert)
        self.base = entries.base
        values = [self._whole_values(name, previous) for name in self.whole]
        self.delta = nn.Parameter(torch.cat([entries.delta, *values]))
        were_whole = previous.closed | previous.whole if previous is not None else {}
        self.closed = {name: shape for name, shape in were_whole.items() if name not in self.whole}
        self.storages |= {name: storages[name] for name in self.closed}
        for name in mask.shape:
            self.storages[name].set_entries(mask.index[name], adds=previous is not None and not revert)
        if exact or any(isinstance(storage, Overlay) for storage in self.storages.values()):
            self._write_all()

    def _whole_values(self, name: str, previous: SparseState | None) -> Tensor:
        """[n] fp32 this rank's values of a weight that is trained whole."""
        if previous is not None and name in previous.whole:
            return previous.delta.detach()[previous.slices[name]]
        own = self.slices[name]
        return self.storages[name].shard[: own.stop - own.start].to(self.device, torch.float32)

    def keys(self) -> Tensor:
        """[num_entries] int64 sorted keys of the entries."""
        return self.rank_shards.keys(self.index, self.device)

    def entries(self) -> Entries:
        """The trained entries as they are now."""
        return Entries(self.keys(), self.base, self.delta.detach()[: self.num_entries])

    def modified_entries(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every entry ever trained and not reverted: weight -> [n] sorted local index, and flat deltas."""
        everything = Entries.merge(self.entries(), self.dropped)
        return self.rank_shards.from_keys(everything.key), everything.delta

    def places_in(self, previous: SparseState) -> tuple[Tensor, Tensor]:
        """Where each place of the flat buffers was in those of the state before.

        Returns:
            [num_local] int64 places, meaningful where the [num_local] bool says that it was trained then.
        """
        position, found = locate(previous.keys(), self.keys())
        positions, founds = [position], [found]
        for name in self.whole:
            own, was = self.slices[name], previous.slices.get(name)
            start = was.start if was and name in previous.whole else 0
            positions.append(torch.arange(start, start + own.stop - own.start, device=self.device))
            founds.append(torch.full_like(positions[-1], name in previous.whole, dtype=torch.bool))
        return torch.cat(positions), torch.cat(founds)

    def _read(self, index: dict[str, Tensor]) -> Tensor:
        """The pretrained values at local indices, flat."""
        values = [self.storages[name].pretrained(where) for name, where in index.items()]
        if not values:  # a mask of no weight
            return torch.empty(0, device=self.device)
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

    def gather_whole(self) -> dict[str, Tensor]:
        """The weights that are or were trained whole, in their shape and the base dtype.

        On rank 0, in host memory; the others get none. Every rank calls this.
        """
        gathered = {}
        for name in self.whole | self.closed:
            storage = self.storages[name]
            shards = collectives.gather(storage.shard.to(self.device), 0)
            if shards is not None:
                shape = full_shape(storage.written[0])
                gathered[name] = shards.view(-1)[: shape.numel()].view(shape).cpu()
        return gathered

    def own_table(self, **columns: Tensor) -> EntryTable:
        """The trained entries with what these [num_local] columns have of them."""
        of_entries = {name: column[: self.num_entries] for name, column in columns.items()}
        return EntryTable(self.rank_shards.to_global(self.index), of_entries)

    def dropped_table(self) -> EntryTable:
        """The dropped entries and their deltas."""
        local = self.rank_shards.from_keys(self.dropped.key)
        return EntryTable(self.rank_shards.to_global(local), {"delta": self.dropped.delta})

    def whole_tables(self, **columns: Tensor) -> dict[str, ShardTable]:
        """`whole`: the whole weights with what these [num_local] columns have of them; `closed`: the values
        of closed ones. A table of no weight is left out.
        """
        tables = {}
        if self.whole:
            counts = {name: self.slices[name].stop - self.slices[name].start for name in self.whole}
            of_whole = {name: column[self.num_entries :] for name, column in columns.items()}
            tables["whole"] = ShardTable(counts, of_whole)
        if self.closed:
            counts = {name: stop - start for name, (start, stop) in spans_of(self.closed).items()}
            values = [self.storages[name].shard[:count] for name, count in counts.items()]
            tables["closed"] = ShardTable(counts, {"value": torch.cat(values)})
        return tables

    @torch.no_grad()
    def restore_closed(self, values: Tensor) -> None:
        """Write saved values of the closed weights, laid end to end, into their shards."""
        parts = values.split([stop - start for start, stop in spans_of(self.closed).values()])
        for name, part in zip(self.closed, parts, strict=True):
            self.storages[name].shard[: part.numel()].copy_(part)

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
        index = {name: dropped.index.get(name, nothing) for name in self.mask.shape}
        local = {name: i.to(self.device) for name, i in self.rank_shards.to_local(index).items()}
        key = self.rank_shards.keys(local, self.device)
        on_shards = {name: where.to(self.storages[name].device) for name, where in local.items()}
        self.dropped = Entries(key, self._read(on_shards), dropped.columns["delta"].to(self.device))
        for name in self.mask.shape:
            self.storages[name].set_entries(all_dropped.get(name, nothing), adds=True)

    @torch.no_grad()
    def write_through(self) -> None:
        """Bring the shards up to date, in place and local."""
        self._write(self.index, (self.base.float() + self.delta[: self.num_entries]).to(self.base.dtype))
        for name in self.whole:
            shard, values = self.storages[name].shard, self.delta[self.slices[name]]
            shard[: values.numel()].copy_(values)
