"""Block floating point: 16 neighbours that share an exponent, a sign and a mantissa each."""

from speft_ds.model.codecs.shared_exponent import SharedExponent

BLOCK = 16


class BlockFloat(SharedExponent):
    """A sign and `bits - 1` bits of mantissa, its leading one not hidden: multiples of 2**(2 - bits) below 2.

    That is a small float of one exponent bit.
    """

    def __init__(self, bits: int):
        super().__init__(f"bfp{bits}", bits, BLOCK, mantissa_bits=bits - 2)
