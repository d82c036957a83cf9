"""Which weights train for the next few steps, where some of them rest."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.data.sampler import hash_seed, permutation
from speft_ds.model.targets import layer_number

KEPT = 0.5  # of a layer's importance, when it is estimated anew
LOWEST = 0.05  # of the largest importance: each layer's turn comes, and its estimate is renewed


class LayerSampler:
    """Samples some of the weights anew every few steps, from the seed and the number of the period.

    `sampled`: random decoder layers are active, and always what is in no layer (LISA, Pan et al., 2024).
    `importance`: the same, a layer as likely as it is important (IST, Yao et al., 2024). IST learns that from
    the losses of forwards of its own. Here it is the norm of the gradient of the layer's entries, as in
    AutoFreeze (Liu et al., 2021), which costs nothing: of the last step of each period in which the layer was
    active, averaged over periods. A layer that was not active yet counts as the most important.
    `half`: a random half of the weights is active (HFT, Hui et al., 2024). `none`: all are.

    Attributes:
        active: names of the active weights; None where nothing is sampled.
        importance: of each layer in ascending order, None where it is not known; the same on every rank.

    Args:
        every: steps of a period.
        num_layers: that are `sampled`.
        names: of the weights.
    """

    def __init__(self, kind: str, every: int, num_layers: int, seed: int, names: list[str]):
        self.kind, self.every, self.num_layers, self.seed, self.names = kind, every, num_layers, seed, names
        self.active: frozenset[str] | None = None
        self.layers = sorted({layer_number(name) for name in names} - {None})
        self.importance: list[float | None] = [None] * len(self.layers)
        self.resample(0)

    def resample(self, step: int) -> None:
        """Choose what is active at step `step` (from 0)."""
        self.step, period = step, step // self.every
        if self.kind == "half":
            order = permutation(len(self.names), self.seed, "layer_gate", period)
            self.active = frozenset(self.names[number] for number in order[: -(-len(order) // 2)])
        elif self.kind in ("sampled", "importance"):
            if self.kind == "sampled":
                order = permutation(len(self.layers), self.seed, "layer_gate", period)
            else:
                order = self._draw(period)
            chosen = {self.layers[number] for number in order[: self.num_layers]} | {None}
            self.active = frozenset(name for name in self.names if layer_number(name) in chosen)

    def _draw(self, period: int) -> list[int]:
        """Positions of the layers in the order of a draw without replacement (Efraimidis & Spirakis, 2006).

        Weights are rounded to quarters of an octave, so that other numbers of ranks, which sum gradients in
        another order, draw the same layers, unless a norm lies at the very edge between two of these.
        """
        most = max((value for value in self.importance if value is not None), default=0.0) or 1.0
        values = [most if value is None else max(value, LOWEST * most) for value in self.importance]
        weights = [2.0 ** (round(4 * math.log2(value)) / 4) for value in values]
        chance = random.Random(hash_seed(self.seed, "layer_gate", period))
        keys = [math.log(1.0 - chance.random()) / weight for weight in weights]
        return sorted(range(len(keys)), key=lambda position: -keys[position])

    @property
    def observes(self) -> bool:
        """Whether the gradient of this step says how important layers are: at the end of a period."""
        return self.kind == "importance" and (self.step + 1) % self.every == 0

    def observe(self, gradient: dict[str, Tensor]) -> None:
        """Estimate the importance of the active layers; all ranks call this together.

        Args:
            gradient: weight -> [own entries] of this rank, summed over the batch.
        """
        squares = torch.zeros(len(self.layers), dtype=torch.float64, device=collectives.device())
        active = {layer_number(name) for name in self.active}
        for name, own in gradient.items():
            if name in self.active and (layer := layer_number(name)) is not None:
                squares[self.layers.index(layer)] += own.double().square().sum()
        norms = collectives.all_reduce(squares).sqrt().tolist()
        for position, (layer, norm) in enumerate(zip(self.layers, norms, strict=True)):
            before = self.importance[position]
            if layer in active:
                self.importance[position] = norm if before is None else KEPT * before + (1 - KEPT) * norm

    def is_active(self, name: str) -> bool:
        """Whether a weight trains now; one that is not sampled always does."""
        return self.active is None or name in self.active or name not in self.names
