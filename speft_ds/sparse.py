"""The trainable state of one rank, and the linear layer whose weight gradient is sparse.

Each rank holds, for the entries in its own shards only, flat `base` and `delta` buffers. After a step

    shard[index] = (base + delta).to(base dtype)

so the shards, and every weight gathered from them, always contain the deltas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds import distributed
from speft_ds.kernels import choose_backend, make_backend
from speft_ds.mask import Mask
from speft_ds.partition import Layout, shard_range


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
            ctx.sink(x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1]))
        grad_x = grad_y.matmul(weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight whose backward feeds `sink(x [tokens, in], grad_y [tokens, out])`.

    Without a sink it is a plain frozen linear and saves no activation. Made from a live `nn.Linear` by
    `adapt`, so that names, hooks and ZeRO-3 state stay as they are.
    """

    sink: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return _LinearWithSink.apply(x, self.weight, self.bias, self.sink)


def adapt(linear: nn.Linear) -> None:
    """Turn a live linear into an `AdaptedLinear` in place."""
    linear.__class__ = AdaptedLinear


class SparseState:
    """What one rank trains: `delta`, flat over all its entries, and what it needs to write it through.

    Args:
        mask: the mask, the same on every rank.
        shards: weight -> this rank's ZeRO-3 shard [shard_numel], written in place.
        backend: sparse gradient backend, `auto` to choose by device and density.
        bucket: entries of one reduce-scatter, over all ranks.
    """

    def __init__(self, mask: Mask, shards: dict[str, Tensor], backend: str = "auto", bucket: int = 2**24):
        self.mask = mask
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.device = distributed.device()
        self.shards = {name: shards[name] for name in mask.shape}
        numel = {name: mask.numel(name) for name in mask.shape}
        self.layout = Layout.of(mask.index, numel, self.world_size)
        self.slices = {name: self.layout.local_slice(name, self.rank) for name in mask.shape}
        # Where the shards are, which may be host memory; base and delta where the optimizer is.
        self.index = {name: self._local_index(name) for name in mask.shape}
        base = [self.shards[name][index] for name, index in self.index.items()]
        self.base = torch.cat(base).to(self.device)
        self.delta = nn.Parameter(torch.zeros(self.num_local, dtype=torch.float32, device=self.device))
        self.backends = {
            name: choose_backend(backend, index.numel() / mask.numel(name), self.device)
            for name, index in mask.index.items()
        }
        self.gradient = SparseGradient(self.layout, self.device, bucket)

    @property
    def num_local(self) -> int:
        """Entries that this rank owns."""
        return self.layout.lengths[self.rank]

    def _local_index(self, name: str) -> Tensor:
        """[entries] sorted indices of this rank's entries into its shard of a weight, dtype as the mask's."""
        bounds = self.layout.bounds[name]
        own = self.mask.index[name][bounds[self.rank] : bounds[self.rank + 1]]
        start, _ = shard_range(self.mask.numel(name), self.rank, self.world_size)
        return (own - start).to(self.shards[name].device)

    def make_sink(self, name: str) -> Callable[[Tensor, Tensor], None] | None:
        """What an adapted linear calls in its backward; None where the mask has no entry of this weight."""
        index = self.mask.index[name]
        if index.numel() == 0:
            return None
        sparse_gradient = make_backend(self.backends[name], index.to(self.device), self.mask.shape[name])

        def sink(x: Tensor, grad_y: Tensor) -> None:
            self.gradient.add(name, sparse_gradient(x, grad_y))

        return sink

    @torch.no_grad()
    def write_through(self) -> None:
        """shard[index] = (base + delta).to(base dtype), in place and local."""
        values = (self.base.float() + self.delta).to(self.base.dtype)
        for name, own in self.slices.items():
            shard = self.shards[name]
            shard[self.index[name]] = values[own].to(shard.device)


class SparseGradient:
    """The k-long gradient of all entries on its way to their owners.

    `pending` is [world_size, longest]: row r holds, in the order of rank r's flat buffers, what this rank
    adds to the gradient of rank r's entries. A reduce-scatter sums each row to its owner; rows are padded
    to the longest only, so traffic is that of k entries when ownership is balanced.
    """

    def __init__(self, layout: Layout, device: torch.device, bucket: int):
        world_size = len(layout.lengths)
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

    def add(self, name: str, values: Tensor) -> None:
        """Accumulate the [k] fp32 gradient of one weight's entries, in index order."""
        torch._foreach_add_(self.views[name], list(values.split(self.counts[name])))

    def reduce(self) -> Tensor:
        """Sum over ranks; returns the [num_local] fp32 gradient of this rank's entries and starts anew."""
        buckets = self.pending.split(self.columns, dim=1)
        own = torch.cat([distributed.reduce_scatter(bucket.contiguous()) for bucket in buckets])
        self.pending.zero_()
        return own[: self.own_length]
