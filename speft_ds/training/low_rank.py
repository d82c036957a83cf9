"""The low-rank matrices of a run: beside which linears, of which rank, within which budget."""

from __future__ import annotations

from torch import nn

from speft_ds.config.recipe import Recipe
from speft_ds.data.sampler import hash_seed
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.kinds.target import Target
from speft_ds.model.low_rank import LowRank, add_low_rank, find_linears, plain_linears, rank_within
from speft_ds.model.targets import shorten, target_shapes
from speft_ds.selection.topk import Parts, min_trainable, num_trainable
from speft_ds.sparse.mask import Mask


def linears_beside(
    model: nn.Module, targets: dict[str, Target], loaded: Mask | None, recipe: Recipe
) -> tuple[dict[str, Target], int]:
    """The linears that low-rank matrices are to go beside, and their rank."""
    method, rank = recipe.method, recipe.method.rank
    if not method.has_lora:
        return {}, 0
    if method.has_mask:
        linears = plain_linears(model, targets)
        others = [name for name in targets if name not in linears]
    else:
        linears, others = find_linears(model, method.targets)
    if others:
        log_rank0(f"note: no plain linears, so without a low-rank matrix: {shorten(others)}")
    if method.has_mask and linears:
        budget = num_trainable(recipe.mask, target_shapes(targets)) * method.lora_share
        if loaded is not None:  # which has the other part of it
            budget = loaded.num_trainable * method.lora_share / (1 - method.lora_share)
        rank = rank_within(linears, budget)
    return linears, rank


def make_low_rank(
    model: nn.Module, linears: dict[str, Target], rank: int, recipe: Recipe, ds_config: dict
) -> LowRank:
    method, seed = recipe.method, hash_seed(recipe.seed, "low_rank")
    low_rank = add_low_rank(model, linears, method.name, rank, method.alpha, seed, ds_config)
    log_rank0(
        f"low rank: matrices of rank {rank} beside {len(linears)} linears, {low_rank.num_elements:,} "
        f"elements, scaled by {low_rank.scaling:.4g}"
    )
    return low_rank


def num_entries(
    recipe: Recipe,
    loaded: Mask | None,
    shapes: dict[str, tuple[int, int]],
    num_low_rank: int,
    parts: Parts | None = None,
) -> int:
    """The entries that the mask is to have: the budget without what low-rank matrices take of it.

    Args:
        parts: see `topk.min_trainable`.
    """
    if not recipe.method.has_mask:
        return 0
    if loaded is not None:
        return loaded.num_trainable
    budget = num_trainable(recipe.mask, shapes, parts)
    least = min_trainable(recipe.mask, shapes, parts)
    if budget - num_low_rank < least:
        total = sum(rows * columns for rows, columns in shapes.values())
        raise UserError(
            f"the budget is {budget:,} elements; low-rank matrices take {num_low_rank:,} of them, and the "
            f"mask needs {least:,} at least",
            recipe.where("mask.density"),
            f"mask.density={(num_low_rank + least) / total:.3g} or more, or method.name=sparse",
        )
    return budget - num_low_rank
