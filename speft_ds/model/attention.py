"""What attention is told of packed rows, so that no kernel and no layer asks the device for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import masking_utils

from speft_ds.errors import UserError

FLEX = "flex_attention"


def check_device(attention: str, device: str, where: str) -> None:
    """Refuse an attention that cannot be trained on this device; raises UserError.

    Args:
        attention: `model.attention`.
        device: `cpu` or `cuda`.
        where: the key, as an error names it.
    """
    if attention == FLEX and device == "cpu":
        what = "flex_attention has no backward on a CPU"
        raise UserError(what, where, "model.attention=sdpa, which is exact with packed rows, too")


@dataclass(frozen=True)
class FlashInputs:
    """How flash attention wants its rows: of any length, laid end to end in a batch of one.

    Attributes:
        takes_lengths: the model passes on where the rows start. Without that, transformers reads it off the
            positions: in every layer, and the host waits for it.
    """

    takes_lengths: bool

    @classmethod
    def of(cls, model: nn.Module) -> FlashInputs | None:
        """None: the model's attention is another."""
        if "flash" not in str(getattr(model.config, "_attn_implementation", None)):
            return None
        arguments = inspect.signature(model.forward).parameters.values()
        return cls(any(argument.kind == argument.VAR_KEYWORD for argument in arguments))

    def __call__(self, inputs: dict[str, Tensor], cu_seq_lens: Tensor, max_length: int) -> dict:
        """A model's [rows, tokens] inputs as one row.

        Args:
            cu_seq_lens: [n + 1] int32, where each packed row starts among all tokens; and the end.
            max_length: tokens of the longest of them.
        """
        flat = {name: tensor.view(1, -1) for name, tensor in inputs.items()}
        if not self.takes_lengths:
            return flat
        edges = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seq_lens)
        return flat | edges | dict.fromkeys(("max_length_q", "max_length_k"), max_length)


@contextmanager
def reads_packing(packing: bool) -> Iterator[None]:
    """Say whether rows are packed: transformers reads it from positions, for which the host would wait.

    Args:
        packing: False: the positions of every row count up from its first token to its last.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _number_of_row if packing else lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _number_of_row(position_ids: Tensor) -> Tensor:
    """[rows, tokens] positions -> which of the packed rows each token is of, from 0."""
    follows = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) == 1
    return (~follows).cumsum(-1)
