"""Numbers stored in 8 bits each, in bitsandbytes' blockwise format."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
Allocate = Callable[[int, torch.device], Tensor]  # number of bytes -> a uint8 tensor of them


def plain_memory(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def paged_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Unified memory of a GPU, which the driver moves to the host where the GPU is full. Never freed."""
    from bitsandbytes.functional import get_paged

    if num_bytes == 0:
        return plain_memory(num_bytes, device)
    return torch.as_tensor(_Unified(get_paged(num_bytes, dtype=torch.uint8, device=device)), device=device)


class _Unified:
    """bitsandbytes' paged tensor, which torch takes for one on the host, as one on the GPU."""

    def __init__(self, paged: Tensor):
        self.paged = paged  # kept alive by the tensor that is made of this
        self.__cuda_array_interface__ = {
            "shape": tuple(paged.shape),
            "typestr": "|u1",
            "data": (paged.data_ptr(), False),
            "version": 3,
        }


def dynamic_map(is_signed: bool) -> Tensor:
    """[256] fp32, ascending: the numbers in [-1, 1] or [0, 1] that the codes stand for (Dettmers, 2016)."""
    # It warns of a kernel for 4-bit products, which we do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=is_signed)


class Blockwise:
    """Numbers as a code each and, for every block of 256, the largest absolute value (`absmax`).

    A number is `map[code] * absmax` of its block, as bitsandbytes' `dequantize_blockwise` has it (Dettmers et
    al., 8-bit Optimizers via Block-wise Quantization, 2022). Rounding is our own, to the nearest:
    `quantize_blockwise` on a CPU (0.50.2) makes of 0 a small number, and an entry without gradient moves.
    What is unsigned and not 0 is never rounded to 0, by which Adam would divide; so an entry whose gradients
    are less than a thousandth of the largest of its block takes shorter steps, not longer ones.

    Attributes:
        code: [num_blocks * BLOCK] uint8.
        absmax: [num_blocks] fp32.
    """

    def __init__(self, is_signed: bool, num_blocks: int, device: torch.device, allocate: Allocate):
        self.map = dynamic_map(is_signed).to(device)
        self.edges = (self.map[1:] + self.map[:-1]) / 2
        if not is_signed:
            self.edges[0] = 0.0
        self.zero = int((self.map == 0).nonzero())
        self.allocate = allocate
        self.code = allocate(num_blocks * BLOCK, device).fill_(self.zero)
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
        more = self.absmax.new_zeros(num_blocks)
        code = self.allocate(self.code.numel() + num_blocks * BLOCK, self.code.device).fill_(self.zero)
        code[: self.code.numel()] = self.code
        self.code, self.absmax = code, torch.cat([self.absmax, more])


def slots_of(blocks: slice) -> slice:
    """Where the numbers of these blocks lie."""
    return slice(blocks.start * BLOCK, blocks.stop * BLOCK)
