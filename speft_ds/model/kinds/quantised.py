"""A linear whose frozen weight is stored in few bits, and the values of its trained entries beside it.

Under ZeRO-3 all three are sharded and gathered like any weight: the codes, their scales, and the values, in
the dtype of the model. The weight itself exists while its layer computes, in the forward and again in the
backward: decoded, with the values in their places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.model.codecs import Codec
from speft_ds.model.kinds.linear import linear_with_hook
from speft_ds.model.kinds.target import Target
from speft_ds.model.weight_grad_hooks import WeightGradHook
from speft_ds.zero.shards import gathered, own_elements, shard_like, shard_of


class QuantisedLinear(nn.Module):
    """A frozen linear in few bits whose backward calls a hook with x [..., in], grad_y [..., out].

    Attributes:
        packed, scales: frozen parameters, as `codec` has them; bias: as the linear's.
        values: [world_size x most] in `dtype`, or None where nothing is trained: those of the entries of rank
            r from r x most on, as many as it owns, which are those in its shard of the weight.
        dense: [out x in] in `dtype`, the complete weight, while something else needs it; see `dense_weights`.
        index: [k] sorted flat indices of the entries that `values` has; counts: of these, each rank's.
        original: this rank's part of the weight before it was coded, in host memory, where that is asked for.

    Args:
        weight: [out, in], complete, in the dtype of the model.
        bias: the parameter, sharded or not; None: there is none.
        make_parameter: of a tensor that is the same on every rank; sharded, where the model is.
    """

    weight_grad_hook: WeightGradHook | None = None
    saves_input: bool | None = None  # as `AdaptedLinear` has it
    recomputes_input = True

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        codec: Codec,
        make_parameter: Callable[[Tensor], nn.Parameter],
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.codec = weight.dtype, codec
        self.packed, self.scales = (make_parameter(part) for part in codec.encode(weight))
        self.bias = bias
        self.values: nn.Parameter | None = None
        self.dense: nn.Parameter | None = None
        self.index: Tensor | None = None
        self.counts: list[int] = []
        self.original: Tensor | None = None
        self.grad_anchor = torch.zeros((), requires_grad=True)  # has no part in any value

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, for code that asks for them; it has no values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """What the weight is made from."""
        if self.dense is not None:
            return (self.dense,)
        return (self.packed, self.scales) + (() if self.values is None else (self.values,))

    def forward(self, x: Tensor) -> Tensor:
        return linear_with_hook(self, x, self.make_weight, self.stored)

    @torch.no_grad()
    def make_weight(self, *stored: Tensor) -> Tensor:
        """[out, in] the weight, from what `stored` names, gathered."""
        if self.dense is not None:
            return stored[0].view(self.shape)
        weight = self.codec.decode(*stored[:2], self.shape, self.dtype)
        if len(stored) > 2:
            weight.view(-1)[self.index] = self._join(stored[2])
        return weight

    def _join(self, values: Tensor) -> Tensor:
        """[k] the ranks' parts of the values, without what fills them up."""
        most = values.numel() // len(self.counts)
        if min(self.counts) == most:
            return values
        lengths = [length for count in self.counts for length in (count, most - count)]
        return torch.cat(values.split(lengths)[::2])

    def pretrained(self) -> Tensor:
        """[out, in] the decoded weight, as if nothing were trained; all ranks call this together."""
        with gathered(self.packed, self.scales):
            return self.codec.decode(self.packed.data, self.scales.data, self.shape, self.dtype)

    def live_weight(self) -> Tensor:
        """[out, in] the weight of the moment, with what is trained; all ranks call this together."""
        with gathered(*self.stored):
            return self.make_weight(*(part.data for part in self.stored)).clone()

    def set_entries(self, index: Tensor, counts: list[int]) -> None:
        """Make room for the values of other entries; whoever calls this writes all of them.

        Args:
            index: [k] sorted flat indices, the same on every rank, on the device that computes.
            counts: how many of these each rank owns.
        """
        self.index, self.counts, self.values = index, counts, None
        if index.numel():
            most = torch.zeros(max(counts) * len(counts), dtype=self.dtype, device=index.device)
            self.values = shard_like(self.packed, most)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.codec.name}"


class QuantisedTarget(Target):
    """A weight in few bits that may be trained."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.shape

    @property
    def written(self) -> list[nn.Parameter]:
        """The parameters whose shards training writes to."""
        own = self.module.dense if self.module.dense is not None else self.module.values
        return [] if own is None else [own]

    @property
    def device(self) -> torch.device:
        return shard_of(self.module.packed).device

    def own_values(self) -> Tensor:
        """This rank's part of the weight as it is now, flat; all ranks call this together."""
        if self.module.dense is not None:
            return own_elements(self.module.dense)[0]
        start, stop = self.own_range
        return self.module.live_weight().view(-1)[start:stop].to(self.device)

    def own_error(self) -> Tensor:
        """[n] fp32 what this rank's part of the weight lost by its few bits; all ranks call this together."""
        start, stop = self.own_range
        decoded = self.module.pretrained().view(-1)[start:stop].float()
        return self.module.original.to(decoded.device).float() - decoded

    def gather(self, owner: int) -> Tensor | None:
        weight = self.module.live_weight()
        return weight if collectives.rank() == owner else None


def adapt(module: QuantisedLinear, recomputes_input: bool = True) -> None:
    module.recomputes_input = recomputes_input
