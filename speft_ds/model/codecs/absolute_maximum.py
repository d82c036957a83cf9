"""Codecs whose scale is the largest absolute value of a block: the blockwise formats of bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds.model.codecs.base import Codec

BLOCK = 64


class AbsoluteMaximum(Codec):
    """Codes of levels in [-1, 1], times the largest absolute value of the block, stored in fp32.

    -1 and 1 are levels, so the largest value of a block comes back exactly; a block of zeros has the scale 0.
    """

    def __init__(self, name: str, bits: int, levels: Tensor):
        super().__init__(name, bits, BLOCK, levels, torch.float32)

    def _encode_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        largest = values.abs().amax(1)
        return self._nearest(values / torch.where(largest > 0, largest, 1.0)[:, None]), largest

    def _nearest(self, scaled: Tensor) -> Tensor:
        """The codes uint8 of the levels that are nearest to these values of [-1, 1]."""
        raise NotImplementedError

    def _factors(self, scales: Tensor) -> Tensor:
        return scales
