"""Where the values of trained entries live: in the shard of their weight, or beside a weight in few bits.

Either way an entry belongs to the rank whose shard of the weight it lies in, so masks, gradients, optimizers
and checkpoints do not ask. All of it is in local indices: flat ones into this rank's shard of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.model.kinds.quantised import QuantisedLinear, QuantisedTarget
from speft_ds.model.kinds.target import Target
from speft_ds.sparse.layout import Layout
from speft_ds.zero.shards import own_range, shard_of, shard_range


class InPlace:
    """Entries in the shard of their weight, where the pretrained values were."""

    def __init__(self, weight: nn.Parameter):
        self.written, self.shard = [weight], shard_of(weight)

    @property
    def device(self) -> torch.device:
        return self.shard.device

    def set_entries(self, index: Tensor, adds: bool = False) -> None:
        """There is room for every entry."""

    def pretrained(self, local: Tensor) -> Tensor:
        """[n] the values at local indices, of which none was trained yet."""
        return self.shard[local]

    def original(self, local: Tensor) -> Tensor:
        """[n] the values at local indices as the checkpoint has them, of which none was trained yet."""
        return self.shard[local]

    def forget_original(self) -> None:
        """The values are kept nowhere else."""

    def write(self, local: Tensor, values: Tensor) -> None:
        self.shard[local] = values


class NewRows(InPlace):
    """The same in a weight that was given more rows: pretrained values of these are 0.

    Args:
        num_pretrained: elements of the weight that the base has.
    """

    def __init__(self, weight: nn.Parameter, num_pretrained: int):
        super().__init__(weight)
        self.num_pretrained = num_pretrained - own_range(weight)[0]  # of this rank's shard

    def pretrained(self, local: Tensor) -> Tensor:
        return self.shard[local].masked_fill(local >= self.num_pretrained, 0.0)

    def original(self, local: Tensor) -> Tensor:
        """[n] the values to start from."""
        return self.shard[local]


class Overlay:
    """Entries whose values lie beside a weight in few bits, which stays as it is.

    The values are a ZeRO-3 parameter, of which each rank's shard has room for as many as the rank with most
    entries owns: so an entry's value lies with the rank that owns the entry, whatever the others own.

    Attributes:
        own: [n] sorted local indices of this rank's entries that have a value.
    """

    def __init__(self, linear: QuantisedLinear):
        self.linear = linear
        rows, columns = linear.shape
        self.numel = rows * columns
        self.start, _ = shard_range(self.numel, collectives.rank(), collectives.world_size())
        self.own = torch.empty(0, dtype=torch.int64, device=self.device)

    @property
    def written(self) -> list[nn.Parameter]:
        return [] if self.linear.values is None else [self.linear.values]

    @property
    def device(self) -> torch.device:
        return shard_of(self.linear.packed).device

    def set_entries(self, index: Tensor, adds: bool = False) -> None:
        """Make room for other entries; all ranks call this together, and write all of them after it.

        Args:
            index: [k] sorted flat indices, the same on every rank.
            adds: whether those that there is room for now stay.
        """
        if adds and self.linear.index is not None:
            index = torch.cat([self.linear.index, index.to(self.linear.index)]).unique()
        layout = Layout.of({"": index}, {"": self.numel}, collectives.world_size())
        first, last = layout.bounds[""][collectives.rank() :][:2]
        self.own = (index[first:last] - self.start).to(self.device)
        self.linear.set_entries(index.to(collectives.device()), layout.counts(""))

    def pretrained(self, local: Tensor) -> Tensor:
        """[n] the decoded values at local indices, trained or not; all ranks call this together."""
        return self.linear.pretrained().view(-1)[local.to(collectives.device()) + self.start].to(self.device)

    def original(self, local: Tensor) -> Tensor:
        """[n] the values at local indices as the checkpoint has them."""
        return self.linear.original[local.to(self.linear.original.device)].to(self.device)

    def forget_original(self) -> None:
        """Nobody asks for the checkpoint's values again."""
        self.linear.original = None

    def write(self, local: Tensor, values: Tensor) -> None:
        """Set the values of entries that there is room for."""
        if not local.numel():
            return
        shard = shard_of(self.linear.values)
        if local.numel() == self.own.numel():  # all of them, in order
            shard[: local.numel()] = values
        else:
            shard[torch.searchsorted(self.own, local)] = values


def storage_of(target: Target, num_rows: int | None = None) -> InPlace | Overlay:
    """Where the entries of a weight live.

    Args:
        num_rows: that it has in the base, where it was given more; None: it was not.
    """
    if num_rows is not None:
        return NewRows(target.weight, num_rows * target.shape[1])
    return Overlay(target.module) if isinstance(target, QuantisedTarget) else InPlace(target.weight)
