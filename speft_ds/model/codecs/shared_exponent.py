"""Codecs whose scale is a power of two, chosen by the exponent of a block's largest value."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from speft_ds.model.codecs.base import Codec

BIAS = 127  # of a stored exponent, as in fp32 and E8M0
NOT_FINITE = 255  # a stored exponent that is none, in both, too


class SharedExponent(Codec):
    """A sign and a small float without infinities, times two to the power of its block's exponent.

    The small floats have an exponent of bias 1 and `mantissa_bits`; below 1 they are subnormal, evenly
    spaced. The block's exponent takes the largest value of the block into their highest binade; what lies
    there above the largest float becomes that. Rounding is to the nearest, a tie to the even code. Zeros keep
    their sign. The smallest exponent is -127: blocks of smaller values use what bits that leaves them. The
    largest one that can be stored stands for NaN, as in E8M0: of a block with a value that is not finite.
    """

    def __init__(self, name: str, bits: int, block: int, mantissa_bits: int):
        self.mantissa_bits = mantissa_bits
        self.num_magnitudes = 2 ** (bits - 1)
        code = torch.arange(self.num_magnitudes)
        binade = ((code >> mantissa_bits) - 1).clamp(min=0)  # 0 for the subnormal ones, too
        magnitudes = (code - (binade << mantissa_bits) << binade) / 2**mantissa_bits
        self.highest_binade = int(binade[-1])
        super().__init__(name, bits, block, torch.cat([magnitudes, -magnitudes]), torch.uint8)

    def _scale(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of blocks [num_blocks, block] fp32, the magnitudes over two to the exponents, and these, uint8."""
        magnitudes = largest = values.abs()
        while largest.shape[1] > 1:  # faster than `amax`, and NaN stays
            largest = torch.maximum(*largest.chunk(2, dim=1))
        exponents = _biased_exponent(largest)
        exponents = torch.where(exponents == NOT_FINITE, exponents, exponents - self.highest_binade)
        exponents.clamp_(min=0)
        # By a power of two: exact, but for values that are far too small to be more than 0.
        magnitudes *= _powers(values.device)[(2 * BIAS - exponents) % 256]
        return magnitudes, exponents.view(-1).to(torch.uint8)

    def _encode_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes, exponents = self._scale(values)
        binade = (_biased_exponent(magnitudes) - BIAS).clamp(min=0)
        magnitudes *= _powers(values.device)[BIAS + self.mantissa_bits - binade]
        codes = magnitudes.round_().to(torch.int32) + (binade << self.mantissa_bits)
        codes.clamp_(0, self.num_magnitudes - 1)  # of NaN, any
        codes += self._signs(values)
        return codes.to(torch.uint8), exponents

    def _signs(self, values: Tensor) -> Tensor:
        """What is added to the codes of negative values, uint8."""
        sign_bits = (values.view(torch.int32) >> 24).to(torch.uint8) & 128
        return sign_bits >> 8 - self.bits

    def _factors(self, scales: Tensor) -> Tensor:
        exponents = scales.view(-1).to(torch.int32)
        return torch.index_select(_powers(scales.device), 0, exponents).view(scales.shape)


def _biased_exponent(positive: Tensor) -> Tensor:
    """The exponent bits of fp32 numbers, int32: 0 for those below 2**-126."""
    return positive.view(torch.int32) >> 23


@cache
def _powers(device: torch.device) -> Tensor:
    """Two to the power of every stored exponent, [256] fp32: the smallest is not normal, the last one NaN."""
    bits = torch.arange(NOT_FINITE + 1, dtype=torch.int32) << 23
    bits[0] = 1 << 22
    powers = bits.view(torch.float32)
    powers[NOT_FINITE] = torch.nan
    return powers.to(device)
