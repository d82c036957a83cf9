"""Clipping of the gradient by norms that are true over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.model.targets import place
from speft_ds.zero.shards import squared_norm


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What to multiply a gradient of this norm by so that its norm is at most `clip_norm`."""
    return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


@dataclass(frozen=True)
class Clip:
    """Bounds the norm of a gradient.

    Attributes:
        mode: `global`: of all entries together; `per_layer`: of each decoder layer's, what is in no layer
            weight by weight; `per_component`: of each weight's.
        clip_norm: the largest norm; None: any.
    """

    mode: str
    clip_norm: float | None

    def __call__(self, gradient: Tensor, norm: float, slices: dict[str, slice]) -> None:
        """Clip in place; every rank calls this.

        Args:
            gradient: [num_local] of this rank's entries.
            norm: its global norm over all ranks.
            slices: weight -> where its entries lie in `gradient`, the same weights on every rank.
        """
        if self.mode == "global":
            gradient.mul_(clip_factor(norm, self.clip_norm))
            return
        layers = {name: place(name)[0] for name in slices}
        by_weight = self.mode == "per_component"
        keys = {name: name if by_weight or layer is None else layer for name, layer in layers.items()}
        number = {key: n for n, key in enumerate(dict.fromkeys(keys.values()))}
        squared = torch.zeros(len(number), dtype=torch.float64, device=gradient.device)
        for name, own in slices.items():
            squared[number[keys[name]]] += squared_norm(gradient[own])
        norms = collectives.all_reduce(squared).sqrt().tolist()
        for name, own in slices.items():
            gradient[own].mul_(clip_factor(norms[number[keys[name]]], self.clip_norm))
