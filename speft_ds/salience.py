"""Scores of the weights, sharded like the weights: which entries are worth training.

One function a metric, in `SALIENCE`. A metric gets a `Scorer` and returns, for each targeted weight, the
fp32 scores of this rank's shard (padding left out).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speft_ds import distributed
from speft_ds.engine import SparseEngine, full_shape, own_elements, shard_of
from speft_ds.kernels.dense import matmul_fp32
from speft_ds.model import mix64
from speft_ds.partition import shard_numel

Scores = dict[str, Tensor]


@dataclass
class Scorer:
    """What a metric may look at.

    Attributes:
        engine: the engine over the frozen base.
        targets: weight name -> adapted linear.
        seed: of the recipe.
        batches: calibration rounds; each a (batch, weight) pair for this rank, where `weight` is what its
            summed token loss is multiplied by (1 / label tokens of the whole set, or 0 for a filler).
        loss: (engine module, batch) -> summed token loss.
    """

    engine: SparseEngine
    targets: dict[str, nn.Linear]
    seed: int
    batches: Iterable[tuple[dict[str, Tensor], float]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]


class GradientSum:
    """Sum over ranks and calibration batches of one weight's dense gradient, kept as this rank's shard.

    The dense gradient of one layer is alive at a time. Ranks' contributions are added in rank order, and
    the batches of a round are dealt to ranks in order, so the sum runs over the batches in one and the
    same order at every world size.
    """

    def __init__(self, weight: nn.Parameter):
        own, _ = own_elements(weight)
        numel, world_size = weight.ds_numel, distributed.world_size()
        self.size = shard_numel(numel, world_size)
        self.padding = self.size * world_size - numel
        self.total = torch.zeros(own.numel(), dtype=torch.float32, device=own.device)

    def __call__(self, x: Tensor, grad_y: Tensor) -> None:
        gradient = matmul_fp32(grad_y.t(), x).reshape(-1)
        if self.padding:
            gradient = torch.cat([gradient, gradient.new_zeros(self.padding)])
        for contribution in distributed.exchange(gradient.view(-1, self.size)):
            self.total += contribution[: self.total.numel()].to(self.total.device)


def calibration_gradient(scorer: Scorer) -> Scores:
    """Gradient of the mean token loss over the calibration set, for every target; weights do not change."""
    sums = {name: GradientSum(linear.weight) for name, linear in scorer.targets.items()}
    for name, linear in scorer.targets.items():
        linear.sink = sums[name]
    try:
        for batch, weight in scorer.batches:
            (scorer.loss(scorer.engine.module, batch) * weight).backward()
            scorer.engine.after_plain_backward()
    finally:
        for linear in scorer.targets.values():
            linear.sink = None
    return {name: dense.total for name, dense in sums.items()}


def gradient(scorer: Scorer) -> Scores:
    """abs(g), g the gradient of the mean token loss over the whole calibration set (SPEFT)."""
    return {name: total.abs_() for name, total in calibration_gradient(scorer).items()}


def magnitude(scorer: Scorer) -> Scores:
    """abs(w): no data."""
    return {name: own_elements(linear.weight)[0].float().abs() for name, linear in scorer.targets.items()}


def random(scorer: Scorer) -> Scores:
    """Uniform in [0, 1), a function of (seed, weight name, global index) alone: the control."""
    return {
        name: uniform(scorer.seed, name, *_span(linear.weight), shard_of(linear.weight).device)
        for name, linear in scorer.targets.items()
    }


def _span(weight: nn.Parameter) -> tuple[int, int]:
    own, start = own_elements(weight)
    return start, start + own.numel()


def uniform(seed: int, name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] fp32 in [0, 1) with 24 random bits, by counter: no generator state, no order."""
    key = zlib.crc32(f"{seed} {name}".encode())
    counter = torch.arange(start, stop, dtype=torch.int64, device=device)
    bits = mix64(mix64(counter + (key << 31)) + key) >> 8 & 0xFFFFFF
    return bits.to(torch.float32) / 2**24


SALIENCE: dict[str, Callable[[Scorer], Scores]] = {
    "gradient": gradient,
    "magnitude": magnitude,
    "random": random,
}
NEEDS_DATA = frozenset({"gradient"})


def target_shapes(targets: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """Weight name -> (out, in), whether or not the weights are gathered."""
    return {name: tuple(full_shape(linear.weight)) for name, linear in targets.items()}
