"""NF4, the 4-bit format of QLoRA (Dettmers et al., 2023), as bitsandbytes stores it."""

import torch
from torch import Tensor

from speft_ds.model.codecs.absolute_maximum import AbsoluteMaximum

# Between each two of them, a standard normal variable has the same probability; 0 is among them. From the
# paper's appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class NF4(AbsoluteMaximum):
    """Of a weight whose width is a multiple of 64, the bytes of `bitsandbytes.functional.quantize_4bit`.

    A value half-way between two levels takes the lower one, as there.
    """

    def __init__(self):
        super().__init__("nf4", 4, torch.tensor(LEVELS))
        self.edges = (self.levels[1:] + self.levels[:-1]) / 2

    def _nearest(self, scaled: Tensor) -> Tensor:
        return torch.bucketize(scaled, self.edges.to(scaled.device), out_int32=True).to(torch.uint8)
