"""The trainable state of one rank, and the linear layer whose weight gradient is sparse.

Each rank holds, for the entries in its own shards only, flat `base` and `delta` buffers. After a step

    shard[index] = (base + delta).to(base dtype)

so the shards, and every weight gathered from them, always contain the deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds import distributed
from speft_ds.checkpoint.parts import Table
from speft_ds.kernels import choose_backend, make_backend
from speft_ds.mask import Mask
from speft_ds.partition import Layout, index_dtype, locate, shard_range

Sink = Callable[[Tensor, Tensor], None]


class _LinearWithSink(torch.autograd.Function):
    """A frozen linear that hands (x, grad_y) of its backward to a sink.

    Saves the leaf parameter itself: ZeRO-3 frees its data after the forward and gathers it again before
    this module's backward. A view (as `F.linear` saves) would keep the gathered weight alive in between.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, sink):
        ctx.save_for_backward(weight, *([x] if sink is not None else []))
        ctx.sink = sink
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        weight, *saved = ctx.saved_tensors
        if ctx.sink is not None:
            (x,) = saved
            ctx.sink(x, grad_y)
        grad_x = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight whose backward feeds `sink(x [..., in], grad_y [..., out])`.

    Without a sink it is a plain frozen linear and saves no activation. Made from a live `nn.Linear` by
    `adapt`, so that names, hooks and ZeRO-3 state stay as they are.
    """

    sink: Sink | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _LinearWithSink.apply(x, self.weight, self.bias, self.sink)


def adapt(linear: nn.Linear) -> None:
    """Turn a live linear into an `AdaptedLinear` in place."""
    linear.__class__ = AdaptedLinear


@contextmanager
def feeding(targets: dict[str, AdaptedLinear], sinks: dict[str, Sink]) -> Iterator[None]:
    """Inside the block, the backward of each target feeds its sink, and what it fed before not."""
    before = {name: linear.sink for name, linear in targets.items()}
    try:
        for name, linear in targets.items():
            linear.sink = sinks[name]
        yield
    finally:
        for name, linear in targets.items():
            linear.sink = before[name]


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
        backend: sparse gradient backend, `auto` to choose by device and density.
        bucket: entries of one reduce-scatter, over all ranks.
        previous: the state that this one follows: entries of both masks keep base and delta.
        revert: what becomes of entries that only `previous` has: True gives them their pretrained values
            back; False keeps what they learnt, as `dropped`.
    """

    def __init__(
        self,
        mask: Mask,
        shards: dict[str, Tensor],
        backend: str = "auto",
        bucket: int = 2**24,
        previous: SparseState | None = None,
        revert: bool = False,
        heads: dict[str, tuple[int, int]] | None = None,
    ):
        self.mask, self.heads = mask, heads or {}
        mask = self.trained = with_heads(mask, self.heads)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.device = distributed.device()
        self.shards = {name: shards[name] for name in mask.shape}
        self.gradient = SparseGradient(mask, self.device, backend, bucket)
        self.layout = self.gradient.layout
        self.slices = {name: self.layout.local_slice(name, self.rank) for name in mask.shape}
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
            whole[name] = torch.cat(distributed.all_gather_padded(own, lengths)).view(shape)
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

    def own_table(self, **columns: Tensor) -> Table:
        """The trained entries in global coordinates, with these [num_local] columns."""
        return Table(to_global(self.index, self.spans), columns)

    def dropped_table(self) -> Table:
        """The dropped entries and their deltas, in global coordinates."""
        index = to_global(self._by_weight(self.dropped.key), self.spans)
        return Table(index, {"delta": self.dropped.delta})

    @torch.no_grad()
    def restore(self, delta: Tensor, dropped: Table) -> None:
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
    rank, world_size = distributed.rank(), distributed.world_size()
    return {name: shard_range(count, rank, world_size) for name, count in numel.items()}


def to_global(index: dict[str, Tensor], spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Local indices into this rank's shards, as flat indices into the whole weights."""
    return {name: local + spans[name][0] for name, local in index.items()}


def join_sinks(*sinks: Sink | None) -> Sink | None:
    """One sink that feeds all that are there."""
    there = [sink for sink in sinks if sink is not None]
    if len(there) < 2:
        return there[0] if there else None

    def feed(x: Tensor, grad_y: Tensor) -> None:
        for sink in there:
            sink(x, grad_y)

    return feed


class SparseGradient:
    """The k-long gradient of a mask's entries on its way to their owners.

    `pending` is [world_size, longest]: row r holds, in the order of rank r's flat buffers, what this rank
    adds to the gradient of rank r's entries. A reduce-scatter sums each row to its owner; rows are padded
    to the longest only, so traffic is that of k entries when ownership is balanced.
    """

    def __init__(self, mask: Mask, device: torch.device, backend: str, bucket: int):
        world_size = distributed.world_size()
        layout = Layout.of(mask.index, {name: mask.numel(name) for name in mask.shape}, world_size)
        self.mask, self.layout, self.device = mask, layout, device
        self.columns = max(1, bucket // world_size)
        self.pending = torch.zeros(world_size, max(layout.lengths), dtype=torch.float32, device=device)
        self.own_length = layout.lengths[distributed.rank()]
        self.counts = {name: layout.counts(name) for name in layout.bounds}
        self.views = {
            name: [
                row[start : start + count]
                for row, start, count in zip(
                    self.pending, layout.offsets[name], self.counts[name], strict=True
                )
            ]
            for name in layout.bounds
        }
        self.backends = {
            name: choose_backend(backend, index.numel() / mask.numel(name), device)
            for name, index in mask.index.items()
        }
        self.sinks = {name: self._make_sink(name) for name in mask.shape}

    def local_index(self) -> dict[str, Tensor]:
        """Weight -> sorted indices of this rank's entries into its shard."""
        rank = distributed.rank()
        return {name: self.layout.local_index(name, i, rank) for name, i in self.mask.index.items()}

    def discard(self) -> None:
        """Forget what was added since the last `reduce`."""
        self.pending.zero_()

    def _make_sink(self, name: str) -> Sink | None:
        """What an adapted linear calls in its backward; None where the mask has no entry of this weight."""
        index = self.mask.index[name]
        if index.numel() == 0:
            return None
        backend = make_backend(self.backends[name], index.to(self.device), self.mask.shape[name])

        def sink(x: Tensor, grad_y: Tensor) -> None:
            self.add(name, backend(x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])))

        return sink

    def add(self, name: str, values: Tensor) -> None:
        """Accumulate the [k] fp32 gradient of one weight's entries, in index order."""
        torch._foreach_add_(self.views[name], list(values.split(self.counts[name])))

    def reduce(self) -> Tensor:
        """Sum over ranks; returns the [num_local] fp32 gradient of this rank's entries and starts anew."""
        buckets = self.pending.split(self.columns, dim=1)
        own = torch.cat([distributed.reduce_scatter(bucket.contiguous()) for bucket in buckets])
        self.pending.zero_()
        return own[: self.own_length]
