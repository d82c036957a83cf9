"""Block floating point: 16 neighbours that share an exponent, a sign and a mantissa each."""

import torch
from torch import Tensor

from speft_ds.model.codecs.shared_exponent import SharedExponent

BLOCK = 16


class BlockFloat(SharedExponent):
    """A sign and `bits - 1` bits of mantissa, its leading one not hidden: multiples of 2**(2 - bits) below 2.

    That is a small float of one exponent bit, whose numbers are evenly spaced.
    """

    def __init__(self, bits: int):
        super().__init__(f"bfp{bits}", bits, BLOCK, mantissa_bits=bits - 2)

    def _encode_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes, exponents = self._scale(values)
        magnitudes *= 2**self.mantissa_bits
        codes = magnitudes.round_().clamp_(0, self.num_magnitudes - 1).to(torch.int8).view(torch.uint8)
        return codes | self._signs(values), exponents
