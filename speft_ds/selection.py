"""Exact distributed top-k: radix select on all-reduced histograms, ties broken by global index.

Scores stay sharded like the weights. Only histograms (order of the number of groups), tie counts and, at
the end, the selected indices (order k) travel between ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds import distributed
from speft_ds.errors import UserError
from speft_ds.mask import Mask
from speft_ds.partition import index_dtype, shard_range

# 32 score bits, most significant first: three histograms of at most 2,048 bins a group.
DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits)


def sortable_key(score: Tensor) -> Tensor:
    """Order-preserving map of fp32 scores to int64 keys in [0, 2^32); -0.0 and 0.0 get one key."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)
    # Negative floats sort in reverse by magnitude: flip their bits; lift the others above them.
    ordered = torch.where(bits < 0, ~bits, bits ^ -(2**31))
    return ordered.to(torch.int64) & 0xFFFFFFFF


def entries_wanted(recipe, shape: dict[str, tuple[int, int]]) -> int:
    """How many entries a recipe's `mask` section asks for; a density is one of the targeted weights.

    Raises:
        UserError: more than the targeted weights have.
    """
    total = sum(rows * columns for rows, columns in shape.values())
    if recipe.num_trainable is not None and recipe.num_trainable > total:
        raise UserError(
            f"{recipe.num_trainable:,} entries are asked for, the targeted weights have {total:,}",
            where="mask.num_trainable",
            fix=f"mask.num_trainable={total} at most, or mask.density",
        )
    return recipe.num_trainable or max(1, round(recipe.density * total))


def budget_counts(numel: dict[str, int], budget: str, num_trainable: int) -> tuple[dict[str, int], list[int]]:
    """Which weights compete for which number of entries.

    Args:
        numel: elements of each weight.
        budget: `global` (one group) or `per_layer` (each weight its own share, in proportion to its size;
            what rounding leaves goes to the largest remainders, ties to the earlier weight).
    Returns:
        weight -> group number, and the number of entries of each group; they sum to `num_trainable`.
    """
    if budget == "global":
        return {name: 0 for name in numel}, [num_trainable]
    total = sum(numel.values())
    shares = [divmod(count * num_trainable, total) for count in numel.values()]
    counts = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(counts)), key=lambda position: -shares[position][1])
    for position in by_remainder[: num_trainable - sum(counts)]:
        counts[position] += 1
    return {name: group for group, name in enumerate(numel)}, counts


def find_thresholds(
    scores: dict[str, Tensor], group: dict[str, int], counts: list[int]
) -> tuple[Tensor, Tensor]:
    """The exact k-th largest key of each group over all ranks.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank.
        group: weight -> group number; counts: entries wanted by each group.
    Returns:
        [groups] int64 thresholds (2^32 where nothing is wanted), and [groups] int64 numbers of entries
        equal to the threshold that are still wanted after taking every larger one.
    """
    wanted = torch.tensor(counts, dtype=torch.int64)
    prefix = torch.zeros(len(counts), dtype=torch.int64)
    candidates: dict[str, Tensor] = {}
    for shift, bits in DIGITS:
        histogram = torch.zeros(len(counts), 2**bits, dtype=torch.int64)
        for name, score in scores.items():
            # Keys are made anew, one weight at a time: kept, they would take twice the scores' memory.
            key = candidates[name] if name in candidates else sortable_key(score)
            digit = (key >> shift) & (2**bits - 1)
            histogram[group[name]] += torch.bincount(digit, minlength=2**bits).cpu()
        histogram = distributed.all_reduce(histogram.to(distributed.device())).cpu()
        # at_least[g, d]: candidates of group g with this digit >= d
        at_least = histogram.flip(1).cumsum(1).flip(1)
        digit = (at_least >= wanted[:, None].clamp(min=1)).sum(1) - 1
        above = at_least.gather(1, digit[:, None])[:, 0] - histogram.gather(1, digit[:, None])[:, 0]
        wanted = (wanted - above).clamp(min=0)
        prefix = prefix + (digit << shift)
        for name, score in scores.items():
            key = candidates[name] if name in candidates else sortable_key(score)
            candidates[name] = key[(key >> shift) == (int(prefix[group[name]]) >> shift)]
    nothing = torch.tensor(counts) == 0
    prefix[nothing] = 2**32
    wanted[nothing] = 0
    return prefix, wanted


def ties_to_take(num_ties: dict[str, int], group: dict[str, int], wanted: Tensor) -> dict[str, int]:
    """How many of this rank's ties of each weight are taken, so that lower global indices come first.

    The global order is weight by weight and, within a weight, rank by rank (shards are consecutive).
    """
    own = torch.tensor(list(num_ties.values()), dtype=torch.int64, device=distributed.device())
    world_size, rank = distributed.world_size(), distributed.rank()
    by_rank = torch.stack(distributed.all_gather_padded(own, [own.numel()] * world_size)).cpu()
    left = wanted.tolist()
    taken = {}
    for position, name in enumerate(num_ties):
        before = left[group[name]]
        counts = by_rank[:, position].tolist()
        taken[name] = min(max(before - sum(counts[:rank]), 0), counts[rank])
        left[group[name]] = max(before - sum(counts), 0)
    return taken


def select_local(scores: dict[str, Tensor], group: dict[str, int], counts: list[int]) -> dict[str, Tensor]:
    """This rank's part of the exact top-k.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard, padding left out, finite.
    Returns:
        weight -> sorted int64 local indices of the selected entries.
    """
    thresholds, wanted = find_thresholds(scores, group, counts)
    limit = {name: int(thresholds[group[name]]) for name in scores}
    num_ties = {name: int((sortable_key(score) == limit[name]).sum()) for name, score in scores.items()}
    take = ties_to_take(num_ties, group, wanted)
    selected = {}
    for name, score in scores.items():
        key = sortable_key(score)
        chosen = key > limit[name]
        chosen[(key == limit[name]).nonzero()[: take[name], 0]] = True
        selected[name] = chosen.nonzero()[:, 0]
    return selected


def gather_mask(local: dict[str, Tensor], shape: dict[str, tuple[int, int]]) -> Mask:
    """Every rank's selected local indices -> one Mask of global indices on every rank (order k traffic)."""
    world_size, rank = distributed.world_size(), distributed.rank()
    numel = {name: rows * columns for name, (rows, columns) in shape.items()}
    dtype = index_dtype(max(numel.values()))
    pieces = [(local[name] + shard_range(numel[name], rank, world_size)[0]).to(dtype) for name in shape]
    own_counts = torch.tensor([piece.numel() for piece in pieces], device=distributed.device())
    counts = [row.tolist() for row in distributed.all_gather_padded(own_counts, [len(pieces)] * world_size)]
    flat = torch.cat(pieces).to(distributed.device())
    by_rank = distributed.all_gather_padded(flat, [sum(row) for row in counts])
    split = [row.split(lengths) for row, lengths in zip(by_rank, counts, strict=True)]
    index = {name: torch.cat([row[position] for row in split]) for position, name in enumerate(shape)}
    return Mask(index=index, shape=dict(shape))


def select(
    scores: dict[str, Tensor], shape: dict[str, tuple[int, int]], num_trainable: int, budget: str = "global"
) -> Mask:
    """The `num_trainable` highest scores over all ranks, equal scores by lower global index.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard, padding left out.
        shape: weight -> (out, in), in model order, which is the order of the global index.
        budget: `global` (one threshold) or `per_layer` (each weight its share of the entries).
    Raises:
        UserError: a score is not finite.
        RuntimeError: the ranks came to different masks (never silently different).
    """
    numel = {name: rows * columns for name, (rows, columns) in shape.items()}
    finite = all(bool(torch.isfinite(score).all()) for score in scores.values())
    if not all(distributed.all_gather_objects(finite)):
        raise UserError(
            "a salience score is not finite",
            where="mask.salience",
            fix="look for rows that overflow the model's dtype; try model.dtype=float32",
        )
    group, counts = budget_counts(numel, budget, num_trainable)
    mask = gather_mask(select_local(scores, group, counts), shape)
    if not distributed.same_on_all_ranks(mask.sha256):
        raise RuntimeError("ranks selected different masks")
    return mask
