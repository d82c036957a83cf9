"""Exact distributed top-k: radix select on all-reduced histograms, ties broken by global index.

Scores stay sharded like the weights. Only histograms (order of the number of groups), tie counts and, at
the end, the selected indices (order k) travel between ranks. Blocks, rows and columns first send the sums
of their scores to the rank that holds the tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.selection.radix import Groups, find_thresholds, positions
from speft_ds.sparse.layout import index_dtype
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.tiles import Tiles, tile_scores
from speft_ds.zero.shards import shard_range


def num_trainable(recipe, shape: dict[str, tuple[int, int]]) -> int:
    """How many entries a recipe's `mask` section asks for; a density is one of the targeted weights.

    Raises:
        UserError: more than the targeted weights have, or so few that a layer, row or tile gets none.
    """
    numel = {name: rows * columns for name, (rows, columns) in shape.items()}
    total = sum(numel.values())
    if recipe.num_trainable is not None and recipe.num_trainable > total:
        raise UserError(
            f"{recipe.num_trainable:,} entries are asked for, the targeted weights have {total:,}",
            where="mask.num_trainable",
            fix=f"mask.num_trainable={total} at most, or mask.density",
        )
    wanted = recipe.num_trainable or round(recipe.density * total)
    least = min_trainable(recipe, shape)
    if wanted < least:
        given = f"density {recipe.density}" if recipe.num_trainable is None else "mask.num_trainable"
        part = {"global": "a single tile", "per_layer": "every layer", "per_row": "every row"}[recipe.budget]
        raise UserError(
            f"{given} comes to {wanted:,} entries, too few to give {part} anything "
            f"(mask.granularity={recipe.granularity}, mask.budget={recipe.budget})",
            where="mask.num_trainable" if recipe.density is None else "mask.density",
            fix=f"mask.num_trainable={least} at least, a density of {least / total:.3g}",
        )
    return wanted


def min_trainable(recipe, shape: dict[str, tuple[int, int]]) -> int:
    """The smallest number of entries with which the budget gives something to all that it must."""
    total = sum(rows * columns for rows, columns in shape.values())
    if recipe.budget == "per_row":  # round(fraction * columns) >= 1 in the narrowest weight
        return total // (2 * min(columns for _, columns in shape.values())) + 1
    tiles = {n: Tiles.of(recipe.granularity, recipe.block_size, s) for n, s in shape.items()}
    if recipe.budget == "global":
        return max(tile.largest for tile in tiles.values())
    shares = (tile.largest * total / (tile.shape[0] * tile.shape[1]) for tile in tiles.values())
    return math.ceil(max(shares))


def budget_counts(numel: dict[str, int], budget: str, num_trainable: int) -> tuple[Groups, list[int]]:
    """Which weights compete for which number of entries.

    Args:
        numel: elements of each weight.
        budget: `global` (one group) or `per_layer` (each weight its own share, in proportion to its size;
            what rounding leaves goes to the largest remainders, ties to the earlier weight).
    Returns:
        weight -> group number, and the number of entries of each group; they sum to `num_trainable`.
    """
    group = groups_by(budget, numel)
    if budget == "global":
        return group, [num_trainable]
    total = sum(numel.values())
    shares = [divmod(count * num_trainable, total) for count in numel.values()]
    counts = [floor for floor, _ in shares]
    by_remainder = sorted(range(len(counts)), key=lambda position: -shares[position][1])
    for position in by_remainder[: num_trainable - sum(counts)]:
        counts[position] += 1
    return group, counts


def groups_by(budget: str, names: Iterable[str]) -> Groups:
    """Which weights compete with each other: all of them (`global`), or each by itself."""
    return {name: 0 if budget == "global" else number for number, name in enumerate(names)}


def ties_to_take(ties: dict[str, Tensor], group: Groups, wanted: Tensor) -> dict[str, int]:
    """How many of this rank's ties of each weight are taken, so that lower global indices come first.

    The global order is weight by weight and, within a weight, rank by rank (shards are consecutive). Ties
    are taken up to the first that does not fit.

    Args:
        ties: weight -> [ties] int64 entries that each tied score of this rank stands for.
        wanted: [groups] int64 entries to take.
    """
    totals = [int(size.sum()) for size in ties.values()]
    own = torch.tensor(totals, dtype=torch.int64, device=collectives.device())
    world_size, rank = collectives.world_size(), collectives.rank()
    by_rank = torch.stack(collectives.all_gather_padded(own, [own.numel()] * world_size)).cpu()
    left = wanted.tolist()
    taken = {}
    for position, (name, size) in enumerate(ties.items()):
        before = left[group[name]]
        totals = by_rank[:, position].tolist()
        taken[name] = int((size.cumsum(0) <= before - sum(totals[:rank])).sum())
        left[group[name]] = before - sum(totals)
    return taken


def select_local(
    scores: dict[str, Tensor], group: Groups, counts: list[int], sizes: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """This rank's part of the exact top-k.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard, padding left out, finite.
        group, counts, sizes: as for `find_thresholds`.
    Returns:
        weight -> sorted int64 local indices of what is selected: the highest scores, down to the first
        that does not fit into its group's count.
    """
    limits, wanted = find_thresholds(scores, group, counts, sizes)
    candidates, is_tie, ties = {}, {}, {}
    for name, score in scores.items():
        limit = limits[group[name]]
        candidates[name] = positions(score, partial(torch.ge, other=limit))
        is_tie[name] = score[candidates[name]] == limit
        where = candidates[name][is_tie[name]]
        ties[name] = sizes[name][where] if sizes else torch.ones_like(where)
    take = ties_to_take(ties, group, wanted)
    selected = {}
    for name, tied in is_tie.items():
        tied[tied.nonzero()[: take[name], 0]] = False  # these are taken; what is still True is not
        selected[name] = candidates[name][~tied]
    return selected


def is_top(values: Tensor, lengths: list[int], count: int) -> Tensor:
    """Which of this rank's values are the highest over all ranks: as `select_local`, of one flat tensor.

    Where a device computes, it is waited for as often as for a single weight.

    Args:
        values: [n] fp32, weight after weight.
        lengths: of each weight, how many of them are its.
        count: how many to select over all ranks.
    Returns:
        [n] bool.
    """
    (limit,), wanted = find_thresholds({"": values}, {"": 0}, [count])
    tied = values == limit
    number = tied.cumsum(0)  # of a tie, from 1
    edges = torch.tensor([0, *accumulate(lengths)], device=values.device)
    before = torch.cat([number.new_zeros(1), number])[edges]  # ties before each weight, and in all
    by_rank = collectives.all_gather_padded(before.diff(), [len(lengths)] * collectives.world_size())
    ties = torch.stack(by_rank, dim=1)  # [weights, ranks], in which order they are taken
    earlier = ties.flatten().cumsum(0).view_as(ties) - ties
    take = (wanted.to(ties.device) - earlier).clamp(min=0)[:, collectives.rank()]
    last = (before[:-1] + take).repeat_interleave(edges.diff(), output_size=values.numel())
    return (values > limit) | (tied & (number <= last))


def gather_mask(local: dict[str, Tensor], shape: dict[str, tuple[int, int]]) -> Mask:
    """Every rank's selected local indices -> one Mask of global indices on every rank (order k traffic).

    Raises:
        RuntimeError: the ranks came to different masks (never silently different).
    """
    return assert_same_mask(Mask(gather_indices(local, {n: r * c for n, (r, c) in shape.items()}), shape))


def assert_same_mask(mask: Mask) -> Mask:
    """The mask, once its hash is seen to be the same on all ranks; RuntimeError where it is not."""
    if not collectives.same_on_all_ranks(mask.sha256):
        raise RuntimeError("ranks selected different masks")
    return mask


def gather_indices(local: dict[str, Tensor], numel: dict[str, int]) -> dict[str, Tensor]:
    """Sorted local indices into every rank's shard -> sorted global ones, on every rank."""
    if not numel:
        return {}
    world_size, rank = collectives.world_size(), collectives.rank()
    dtype = index_dtype(max(numel.values()))
    pieces = [(local[name] + shard_range(numel[name], rank, world_size)[0]).to(dtype) for name in numel]
    own_counts = torch.tensor([piece.numel() for piece in pieces], device=collectives.device())
    counts = [row.tolist() for row in collectives.all_gather_padded(own_counts, [len(pieces)] * world_size)]
    flat = torch.cat([piece.to(collectives.device()) for piece in pieces])
    by_rank = collectives.all_gather_padded(flat, [sum(row) for row in counts])
    split = [row.split(lengths) for row, lengths in zip(by_rank, counts, strict=True)]
    return {name: torch.cat([row[position] for row in split]) for position, name in enumerate(numel)}


def require_finite(scores: dict[str, Tensor]) -> None:
    """Raise a UserError on every rank where a score of any of them is infinite or NaN."""
    finite = all(
        score.numel() == 0 or all(map(math.isfinite, torch.aminmax(score))) for score in scores.values()
    )
    if not all(collectives.all_gather_objects(finite)):
        raise UserError(
            "a salience score is not finite",
            where="mask.salience",
            fix="look for rows that overflow the model's dtype; try model.dtype=float32",
        )


def select(
    scores: dict[str, Tensor],
    shape: dict[str, tuple[int, int]],
    num_trainable: int,
    budget: str = "global",
    granularity: str = "element",
    block_size: int = 16,
) -> Mask:
    """The highest scores over all ranks, equal scores by lower global index.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard, padding left out.
        shape: weight -> (out, in), in model order, which is the order of the global index.
        num_trainable: entries to select. Blocks, rows and columns are taken while they fit, so there may
            be a few less; `per_row` takes round(num_trainable / all * in) of each row.
        budget: `global` (one threshold), `per_layer` (each weight its share) or `per_row`.
        granularity: `element`, `block`, `row` or `column`: tiles score the mean of their entries.
    Raises:
        UserError: a score is not finite.
    """
    require_finite(scores)
    numel = {name: rows * columns for name, (rows, columns) in shape.items()}
    if budget == "per_row":
        fraction = num_trainable / sum(numel.values())
        quota = {name: round(fraction * columns) for name, (_, columns) in shape.items()}
        return gather_mask(select_per_row(scores, shape, quota), shape)
    group, counts = budget_counts(numel, budget, num_trainable)
    if granularity == "element":
        return gather_mask(select_local(scores, group, counts), shape)
    tiles = {name: Tiles.of(granularity, block_size, shape[name]) for name in shape}
    return select_tiles(tile_scores(scores, tiles), tiles, group, counts)


def select_tiles(
    scores: dict[str, Tensor], tiles: dict[str, Tiles], group: Groups, counts: list[int]
) -> Mask:
    """The mask of the entries of the best tiles; `scores` as from `tile_scores`."""
    rank, world_size = collectives.rank(), collectives.world_size()
    sizes = {}
    for name, score in scores.items():
        first, last = shard_range(tiles[name].num_tiles, rank, world_size)
        sizes[name] = tiles[name].sizes(torch.arange(first, last, device=score.device))
    chosen = select_local(scores, group, counts, sizes)
    chosen = gather_indices(chosen, {name: tile.num_tiles for name, tile in tiles.items()})
    shape = {name: tile.shape for name, tile in tiles.items()}
    dtype = index_dtype(max(rows * columns for rows, columns in shape.values()))
    index = {name: tile.entries(chosen[name]).to(dtype) for name, tile in tiles.items()}
    return assert_same_mask(Mask(index, shape))


def select_per_row(
    scores: dict[str, Tensor], shape: dict[str, tuple[int, int]], quota: dict[str, int]
) -> dict[str, Tensor]:
    """This rank's part of the `quota[weight]` best of every row.

    Rows that lie within one shard are decided by their rank alone; those cut by the edge of a shard by
    all ranks together, as groups of a distributed top-k.

    Returns:
        weight -> sorted int64 local indices.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    selected = {}
    for name, score in scores.items():
        rows, columns = shape[name]
        start, stop = shard_range(rows * columns, rank, world_size)
        first, last = -(-start // columns), stop // columns  # the rows that are wholly ours
        chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        if first < last:
            inside = slice(first * columns - start, last * columns - start)
            chosen[inside] = top_of_rows(score[inside].view(-1, columns), quota[name]).view(-1)
        edges = [shard_range(rows * columns, other, world_size)[0] for other in range(1, world_size)]
        cut = sorted({edge // columns for edge in edges if edge % columns})
        pieces = {}  # what of these rows lies in our shard, as local indices
        for row in cut:
            bounds = (min(max(edge, start), stop) - start for edge in (row * columns, (row + 1) * columns))
            pieces[str(row)] = slice(*bounds)
        if pieces:
            group = {row: number for number, row in enumerate(pieces)}
            parts = {row: score[piece] for row, piece in pieces.items()}
            for row, found in select_local(parts, group, [quota[name]] * len(group)).items():
                chosen[found + pieces[row].start] = True
        selected[name] = chosen.nonzero()[:, 0]
    return selected


def top_of_rows(scores: Tensor, k: int) -> Tensor:
    """[rows, columns] bool: the k highest of each row, equal ones by lower column."""
    limit = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > limit, scores == limit
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))
