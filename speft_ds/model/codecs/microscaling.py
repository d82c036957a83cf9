"""The MX formats of the OCP Microscaling specification 1.0: 32 small floats that share an E8M0 scale."""

from speft_ds.model.codecs.shared_exponent import SharedExponent

BLOCK = 32


class Microscaling(SharedExponent):
    """A sign, two exponent bits and mantissa bits: E2M1 for `mxfp4`, E2M3 for `mxfp6`."""

    def __init__(self, bits: int):
        super().__init__(f"mxfp{bits}", bits, BLOCK, mantissa_bits=bits - 3)
