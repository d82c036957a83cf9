"""Codecs: how the weights of a frozen base are stored in few bits. A family per file, one interface.

A new format is a new codec and a line in `CODECS`; `config/values.py` has the names for recipes.
"""

from speft_ds.config.values import BASE_FORMATS
from speft_ds.errors import UserError, did_you_mean
from speft_ds.model.codecs.base import Codec
from speft_ds.model.codecs.block_float import BlockFloat
from speft_ds.model.codecs.int8 import Int8
from speft_ds.model.codecs.microscaling import Microscaling
from speft_ds.model.codecs.nf4 import NF4

__all__ = ["CODECS", "Codec", "base_in_words", "codec"]

_ALL = (Int8(), BlockFloat(8), BlockFloat(6), BlockFloat(4), NF4(), Microscaling(6), Microscaling(4))
CODECS: dict[str, Codec] = {each.name: each for each in _ALL}
assert tuple(CODECS) == BASE_FORMATS


def base_in_words(dtype: str, base_format: str | None, num_weights: int) -> str:
    """How a base is stored: `bfloat16, 224 weights in nf4 of 4.50 bits each`."""
    if base_format is None:
        return dtype
    bits = codec(base_format).bits_per_weight
    return f"{dtype}, {num_weights:,} weights in {base_format} of {bits:.2f} bits each"


def codec(name: str) -> Codec:
    """The codec of a format. Raises UserError where there is none of this name."""
    if name not in CODECS:
        raise UserError(f"{name!r:.50} is no format of weights", fix=did_you_mean(name, CODECS))
    return CODECS[name]
