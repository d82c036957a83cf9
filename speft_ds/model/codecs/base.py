"""What the codecs of weights share: blocks along each row, rows at a time, codes packed into bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from speft_ds.errors import UserError

CHUNK = 2**18  # weights that are worked on at once: what a core's cache holds
DEVICE_CHUNK = 2**24  # on a GPU, where a launch costs more than the memory


class Codec:
    """A weight [rows, columns] as codes of a few bits, and a scale for each block of a row.

    A block is `block` neighbours along the columns; the last one of a row is filled up with zeros where the
    width is not a multiple. So the packed bytes and the scales of a row follow those of the row before. Every
    weight is `levels[code] * factor`, the factor made of its block's scale: one product in fp32, rounded once
    to the dtype that is asked for. So decoding gives the same bits on every rank and device.

    Attributes:
        name: as in a recipe.
        bits: of a code: 4, 6 or 8.
        block: weights that share a scale, a multiple of 16.
        levels: [2**bits] fp32, what the codes stand for before they are scaled.
        scale_dtype: of the stored scales.
    """

    def __init__(self, name: str, bits: int, block: int, levels: Tensor, scale_dtype: torch.dtype):
        assert levels.shape == (2**bits,) and block % 16 == 0
        self.name, self.bits, self.block, self.scale_dtype = name, bits, block, scale_dtype
        self.levels = levels.to(torch.float32)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of a scale among them."""
        return self.bits + 8 * self.scale_dtype.itemsize / self.block

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes of the packed codes and number of scales of a weight of this shape."""
        rows, columns = shape
        num_blocks = rows * -(-columns // self.block)
        return num_blocks * self.block * self.bits // 8, num_blocks

    @torch.no_grad()
    def encode(self, weight: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
        """The codes of a weight, each the nearest to its value, and the scales.

        Args:
            weight: [rows, columns] fp32, bf16 or fp16, in any order of memory.
            check: False does not look, which takes a read of the device: with a shared exponent, a block with
                an infinite or NaN value is decoded as NaN throughout.
        Returns:
            packed uint8 and scales of `scale_dtype`, both flat, of `sizes(weight.shape)`, on its device.
        Raises:
            UserError: a weight is infinite or not a number.
        """
        num_bytes, num_scales = self.sizes(weight.shape)
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(num_scales, dtype=self.scale_dtype, device=weight.device)
        rows, columns = weight.shape
        for part in _chunks(weight.shape, weight.device):
            values = weight[part].to(torch.float32)
            if columns % self.block:
                values = F.pad(values, (0, -columns % self.block))
            values = values.reshape(-1, self.block)
            if check and not values.isfinite().all():
                what = f"a value is infinite or not a number: {self.name} has no code for it"
                raise UserError(what, fix="take a checkpoint whose weights are all finite, or no format")
            codes, own_scales = self._encode_blocks(values)
            _of_rows(packed, part, rows).copy_(_pack(codes.view(part.stop - part.start, -1), self.bits))
            _of_rows(scales, part, rows).copy_(own_scales.view(part.stop - part.start, -1))
        return packed, scales

    @torch.no_grad()
    def decode(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [rows, columns] of this dtype, from what `encode` returned."""
        rows, columns = shape
        weight = torch.empty(shape, dtype=dtype, device=packed.device)
        for part in _chunks(shape, packed.device):
            values = self._lookup(_of_rows(packed, part, rows)).view(-1, self.block)
            values *= self._factors(_of_rows(scales, part, rows).reshape(-1, 1))
            weight[part] = values.view(part.stop - part.start, -1)[:, :columns]
        return weight

    def round_trip(self, values: Tensor, check: bool = True) -> Tensor:
        """What the codes of `values` [..., columns] stand for, in their dtype; `check` as for `encode`."""
        matrix = values.reshape(-1, values.shape[-1])
        return self.decode(*self.encode(matrix, check), matrix.shape, values.dtype).view(values.shape)

    def _encode_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 and scales [num_blocks] of blocks [num_blocks, block] fp32."""
        raise NotImplementedError

    def _factors(self, scales: Tensor) -> Tensor:
        """What the levels are multiplied by, fp32, of the stored scales."""
        raise NotImplementedError

    def _lookup(self, packed: Tensor) -> Tensor:
        """The level of every code, flat fp32, of packed rows [rows, bytes]: two codes in one look-up."""
        num_bytes = packed.shape[1]
        if self.bits == 4:
            pairs = packed.reshape(-1).to(torch.int32)
        elif self.bits == 8:
            codes = packed.reshape(-1)
            if codes.storage_offset() % 2:  # gathered behind something else
                codes = codes.clone()
            pairs = codes.view(torch.uint16).to(torch.int32)
        else:
            low, high = packed.split([num_bytes // 3 * 2, num_bytes // 3], dim=1)
            halves = torch.index_select(_halves(packed.device), 0, high.reshape(-1).to(torch.int32))
            pairs = halves.view(torch.int32).add_(low.reshape(-1))
        return torch.index_select(self._pairs(packed.device), 0, pairs).view(torch.float32)

    @cache  # noqa: B019 - the codecs live as long as the process
    def _pairs(self, device: torch.device) -> Tensor:
        """The levels of every pair of codes, [4**bits] int64 of two fp32 each; see `_pack`."""
        pair = torch.arange(4**self.bits)
        codes = [pair >> self.bits, pair % 2**self.bits]
        if self.bits == 8:  # two bytes, read as one little-endian number
            codes.reverse()
        return self.levels[torch.stack(codes, dim=1)].view(torch.int64).view(-1).to(device)


def _chunks(shape: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """Rows to work on at once."""
    rows, columns = shape
    step = max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _of_rows(flat: Tensor, part: slice, rows: int) -> Tensor:
    """The part of these rows of what all `rows` hold in equal shares: [rows of the part, share]."""
    return flat.view(rows, -1)[part]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] uint8 -> [rows, columns * bits / 8] uint8.

    Of 4 bits, two to a byte, the first in the high half, as bitsandbytes has them. Of 6 bits, two make a
    number of 12, the first in its high half: all low bytes of a row, then all high halves of a byte, again
    two to a byte. So both are read in long runs.
    """
    if bits == 8:
        return codes
    if bits == 4:
        pairs = codes.view(torch.int16)  # the first code in the low byte
        return (pairs << 4 | pairs >> 8).to(torch.uint8)
    pairs = codes[:, ::2].to(torch.int32) << 6 | codes[:, 1::2]
    return torch.cat([(pairs & 255).to(torch.uint8), _pack((pairs >> 8).to(torch.uint8), 4)], dim=1)


@cache
def _halves(device: torch.device) -> Tensor:
    """Both halves of a byte, each as bits 8 to 11 of a number: [256] int64 of two int32 each."""
    byte = torch.arange(256, dtype=torch.int32)
    return torch.stack([byte >> 4 << 8, (byte & 15) << 8], dim=1).view(torch.int64).view(-1).to(device)
