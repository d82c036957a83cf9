"""Masks that leave the zeros of a pruned base alone, so that the trained model is as sparse (SQFT, 2024).

Munoz et al., SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models. A zero is an element
that is exactly 0 now; of a base in few bits, one that its format decodes to 0. It was 0 in the checkpoint, as
no zero is ever trained, or rounding or training has brought it to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.kinds.target import Target
from speft_ds.selection.columns import OUTSIDE
from speft_ds.selection.topk import select
from speft_ds.sparse.layout import RankShards
from speft_ds.sparse.mask import Mask


def select_nonzero(
    scores: dict[str, Tensor],
    targets: dict[str, Target],
    shape: dict[str, tuple[int, int]],
    num_trainable: int,
    budget: str,
) -> Mask:
    """The highest scores of what is not zero, as `topk.select`, which has the other arguments; in place.

    Raises:
        UserError: a score is not finite, or so much is zero that there are too few entries.
    """
    for name, score in scores.items():
        score.masked_fill_((targets[name].own_values() == 0).to(score.device), OUTSIDE)
    left = count_over_ranks({name: score > OUTSIDE for name, score in scores.items()})
    mask = select(scores, shape, num_trainable, budget)
    shards = RankShards({name: mask.numel(name) for name in shape})
    own = shards.to_local(shards.select(mask.index))
    zeros = {name: scores[name][index.to(scores[name].device)] == OUTSIDE for name, index in own.items()}
    if short := [name for name, count in count_over_ranks(zeros).items() if count]:
        name = short[0]
        place, wanted, there = f" of {name}", mask.index[name].numel(), left[name]
        if budget == "global":
            place, wanted, there = "", num_trainable, sum(left.values())
        if budget == "per_row":
            place = f" of some row of {name}, which has {shape[name][0]:,},"
        what = f"too many weights{place} are zero: {wanted:,} entries are wanted, {there:,} are not zero"
        raise UserError(what, "mask.only_nonzero", "a lower mask.density, or mask.only_nonzero=false")
    total = mask.num_target_elements
    log_rank0(f"chosen among {sum(left.values()):,} of {total:,} weights, the others are zero")
    return mask


def count_over_ranks(chosen: dict[str, Tensor]) -> dict[str, int]:
    """weight -> how many of [local elements] bool are True, over all ranks."""
    counts = torch.tensor([int(where.sum()) for where in chosen.values()], device=collectives.device())
    return dict(zip(chosen, collectives.all_reduce(counts).tolist(), strict=True))
