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
from speft_ds.selection.topk import budget_counts, row_quotas, select
from speft_ds.sparse.mask import Mask
from speft_ds.zero.shards import shard_range


def select_nonzero(
    scores: dict[str, Tensor],
    targets: dict[str, Target],
    shape: dict[str, tuple[int, int]],
    num_trainable: int,
    budget: str,
) -> Mask:
    """The highest scores of what is not zero, as `topk.select`, which has the other arguments; in place.

    Raises:
        UserError: a score is not finite, or too much is zero.
    """
    for name, where in find_nonzero(targets, shape, num_trainable, budget).items():
        scores[name].masked_fill_(~where.to(scores[name].device), OUTSIDE)
    return select(scores, shape, num_trainable, budget)


def require_nonzero(
    targets: dict[str, Target], shape: dict[str, tuple[int, int]], num_trainable: int, budget: str
) -> None:
    """Refuse a base with too many zeros, before it is scored; rank 0 says how many are none."""
    left = count_over_ranks(find_nonzero(targets, shape, num_trainable, budget))
    total = sum(target.numel for target in targets.values())
    log_rank0(f"{sum(left.values()):,} of the targets' {total:,} weights are not zero")


def find_nonzero(
    targets: dict[str, Target], shape: dict[str, tuple[int, int]], num_trainable: int, budget: str
) -> dict[str, Tensor]:
    """weight -> [local elements] bool: what of this rank's shard is not zero.

    Raises:
        UserError: it is less than the budget is to have of all weights, a weight or a row.
    """
    nonzero = {name: target.own_values() != 0 for name, target in targets.items()}
    if budget == "per_row":
        quotas = row_quotas(shape, num_trainable)
        least = {name: int(_count_by_row(nonzero[name], shape[name]).min()) for name in shape}
        rooms = [(f" of some row of {name}", least[name], quotas[name]) for name in shape]
    else:
        left = count_over_ranks(nonzero)
        numel = {name: rows * columns for name, (rows, columns) in shape.items()}
        _, counts = budget_counts(numel, budget, num_trainable)
        if budget == "global":
            rooms = [("", sum(left.values()), num_trainable)]
        else:
            rooms = [(f" of {name}", left[name], count) for name, count in zip(left, counts, strict=True)]
    for place, there, wanted in rooms:
        if there < wanted:
            what = f"too many weights{place} are zero: {wanted:,} entries are wanted, {there:,} are not zero"
            raise UserError(what, "mask.only_nonzero", "a lower mask.density, or mask.only_nonzero=false")
    return nonzero


def _count_by_row(nonzero: Tensor, shape: tuple[int, int]) -> Tensor:
    """[rows] int64 how many of a weight's [local elements] are True in each row, over all ranks."""
    start, stop = shard_range(shape[0] * shape[1], collectives.rank(), collectives.world_size())
    row = torch.arange(start, stop, device=nonzero.device) // shape[1]
    counts = torch.zeros(shape[0], dtype=torch.int64, device=nonzero.device)
    counts.index_add_(0, row, nonzero.to(torch.int64))
    return collectives.all_reduce(counts.to(collectives.device()))


def count_over_ranks(chosen: dict[str, Tensor]) -> dict[str, int]:
    """weight -> how many of [local elements] bool are True, over all ranks."""
    counts = torch.tensor([int(where.sum()) for where in chosen.values()], device=collectives.device())
    return dict(zip(chosen, collectives.all_reduce(counts).tolist(), strict=True))
