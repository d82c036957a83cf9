"""LongRoPE (Ding et al., 2024) row by row.

`transformers` rotates a batch by the short or by the long factors, as its longest row says. Here each row is
rotated as if it were alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rotate_by_row(model: nn.Module) -> int | None:
    """Have a model's LongRoPE choose its factors for each row of `position_ids`, packed ones, too.

    Returns:
        The longest row that the short factors are for; None: the model has no LongRoPE.
    """
    switches = set()
    for module in model.modules():
        rope = getattr(getattr(module, "config", None), "rope_parameters", None)
        if isinstance(rope, dict) and hasattr(module, "rope_type") and hasattr(module, "original_inv_freq"):
            if "forward" not in module.__dict__:
                module.forward = _by_row(module.forward, rope)
            switches |= {switch for part in (rope, *rope.values()) if (switch := _switch(part)) is not None}
    return min(switches, default=None)


def _switch(rope: object) -> int | None:
    is_longrope = isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    return rope["original_max_position_embeddings"] if is_longrope else None


def _by_row(forward, rope: dict):
    def rotate(x: Tensor, position_ids: Tensor, *layer_type, **named) -> tuple[Tensor, Tensor]:
        of_layer = next(iter((*layer_type, *named.values())), None)
        switch = _switch(rope if of_layer is None else rope[of_layer])
        if switch is None:
            return forward(x, position_ids, *layer_type, **named)
        short = forward(x, position_ids.clamp(max=switch - 1), *layer_type, **named)
        long = forward(x, position_ids, *layer_type, **named)
        is_long = (row_lengths(position_ids) > switch).unsqueeze(-1)
        return tuple(torch.where(is_long, *pair) for pair in zip(long, short, strict=True))

    return rotate


def row_lengths(position_ids: Tensor) -> Tensor:
    """Of each token the length of its row; rows end where [..., tokens] positions do not count on."""
    ends = torch.ones_like(position_ids, dtype=torch.bool)
    ends[..., :-1] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    places = torch.arange(position_ids.shape[-1], device=position_ids.device)
    ends_at = places.where(ends, position_ids.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return position_ids.gather(-1, ends_at) + 1
