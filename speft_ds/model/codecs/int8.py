"""8-bit integers in bitsandbytes' blockwise format, with evenly spaced levels."""

import torch
from torch import Tensor

from speft_ds.model.codecs.absolute_maximum import AbsoluteMaximum


class Int8(AbsoluteMaximum):
    """Codes 1 to 255 for -127/127 to 127/127, read by `dequantize_blockwise` with `levels` as its `code`.

    bitsandbytes' default map is for optimizer states, finer near 0: its error on weights is larger, and it
    has no level at -1, so that a block whose largest value is negative shrinks each time it is encoded. A
    tie goes to the even integer.
    """

    def __init__(self):
        super().__init__("int8", 8, (torch.arange(256) - 128) / 127)

    def _nearest(self, scaled: Tensor) -> Tensor:
        return (scaled * 127).round_().add_(128).to(torch.uint8)
