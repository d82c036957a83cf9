"""Numbers stored in 8 bits each, in bitsandbytes' blockwise format."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


class Blockwise:
    """Numbers as a code each and, for every block of 256, the largest absolute value (`absmax`).

    A number is `map[code] * absmax` of its block, as bitsandbytes' `dequantize_blockwise` has it (Dettmers et
    al., 8-bit Optimizers via Block-wise Quantization, 2022). Rounding is our own, to the nearest:
    `quantize_blockwise` on a CPU (0.50.2) makes of 0 a small number, and an entry without gradient moves.
    What is unsigned and not 0 is never rounded to 0, by which Adam would divide; so an entry whose gradients
    are less than a thousandth of the largest of its block takes shorter steps, not longer ones.

    Attributes:
        map: [256] fp32, ascending: the numbers in [-1, 1] or [0, 1] that the codes stand for.
        code: [num_blocks * BLOCK] uint8.
        absmax: [num_blocks] fp32.
    """

    def __init__(self, is_signed: bool, num_blocks: int, device: torch.device):
        # It warns of a kernel for 4-bit products, which we do not use.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from bitsandbytes.functional import create_dynamic_map

        self.map = create_dynamic_map(signed=is_signed).to(device)
        self.edges = (self.map[1:] + self.map[:-1]) / 2
        if not is_signed:
            self.edges[0] = 0.0
        self.zero = int((self.map == 0).nonzero())
        self.code = torch.full((num_blocks * BLOCK,), self.zero, dtype=torch.uint8, device=device)
        self.absmax = torch.zeros(num_blocks, dtype=torch.float32, device=device)

    def read(self, blocks: slice) -> Tensor:
        """The numbers of these blocks, flat fp32."""
        scaled = self.map[self.code[slots_of(blocks)].to(torch.int32)].view(-1, BLOCK)
        return (scaled * self.absmax[blocks, None]).view(-1)

    def write(self, blocks: slice, values: Tensor, resting: Tensor | None = None) -> None:
        """Store the numbers of these blocks.

        Args:
            values: [len(blocks) * BLOCK] fp32.
            resting: [len(blocks) * BLOCK] bool: which of them are as `read` gave them. Their blocks keep
                `absmax` unless it is exceeded, so that they are not rounded again and again.
        """
        values = values.view(-1, BLOCK)
        largest = values.abs().amax(1)
        if resting is not None:
            before = torch.where(resting.view(-1, BLOCK).any(1), self.absmax[blocks], 0.0)
            largest = torch.maximum(largest, before)
        scaled = values / torch.where(largest > 0, largest, 1.0)[:, None]
        code = torch.bucketize(scaled, self.edges, out_int32=True)
        self.code[slots_of(blocks)] = code.view(-1).to(torch.uint8)
        self.absmax[blocks] = largest

    def grow(self, num_blocks: int) -> None:
        """Add blocks of zeros."""
        self.code = F.pad(self.code, (0, num_blocks * BLOCK), value=self.zero)
        self.absmax = F.pad(self.absmax, (0, num_blocks))


def slots_of(blocks: slice) -> slice:
    """Where the numbers of these blocks lie."""
    return slice(blocks.start * BLOCK, blocks.stop * BLOCK)
