"""The mask: which entries of which weights are trained. Every rank holds the same one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Sorted global flat indices a weight.

    Attributes:
        index: weight name -> [k] sorted global flat indices (int32, or int64 from 2^31 elements on).
        shape: weight name -> (out_features, in_features); names every target, also one without entries.
    """

    index: dict[str, Tensor]
    shape: dict[str, tuple[int, int]]

    @cached_property
    def num_trainable(self) -> int:
        return sum(index.numel() for index in self.index.values())

    @cached_property
    def num_target_elements(self) -> int:
        """Elements of all targeted weights: what `density` is a fraction of."""
        return sum(self.numel(name) for name in self.shape)

    @property
    def density(self) -> float:
        return self.num_trainable / self.num_target_elements

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and indices (as little-endian int64), the same on every rank and device."""
        digest = hashlib.sha256()
        for name in sorted(self.index):
            digest.update(f"{name} {self.shape[name][0]} {self.shape[name][1]}\n".encode())
            digest.update(self.index[name].to("cpu", torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def numel(self, name: str) -> int:
        rows, columns = self.shape[name]
        return rows * columns

    def facts(self) -> dict:
        """What a report says of the mask: counts, density (of the targeted weights), hash."""
        return {
            "num_trainable": self.num_trainable,
            "num_target_elements": self.num_target_elements,
            "density": self.density,
            "sha256": self.sha256,
            "per_layer": {name: index.numel() for name, index in self.index.items()},
        }
