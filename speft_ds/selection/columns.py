"""Entries in few columns of the weights, so that their gradient is a small dense product.

The gradient of the entries in some columns is `grad_y^T @ x[:, columns]`: its cost grows with the columns,
not with the weight. Large gradients crowd in few of them. Columns are chosen by their squared score per
multiply-add, until a share of the dense gradient's multiply-adds is spent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.selection.topk import (
    budget_counts,
    gather_indices,
    groups_by,
    require_finite,
    select_local,
)
from speft_ds.sparse.tiles import Tiles, fixed_point_shift, local_means
from speft_ds.zero.shards import shard_range

Shapes = dict[str, tuple[int, int]]
OUTSIDE = torch.finfo(torch.float32).min  # a score that no entry has


def choose_columns(
    scores: dict[str, Tensor], shape: Shapes, compute: float, budget: str
) -> dict[str, Tensor]:
    """The columns that the entries may lie in, the same at every world size.

    A column is worth the squares of its scores over its multiply-adds, as many as it has entries. Of scores
    of both signs the positive ones count; where none is positive, how far they are above the lowest.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank's shard, padding left out, finite.
        shape: weight -> (out, in).
        compute: `mask.compute`, the share of all weights' multiply-adds; with the `per_layer` budget, of each
            weight's, a column at least.
    Returns:
        weight -> sorted int64 columns, on every rank.
    """
    highest, lowest = _range(scores)
    base = lowest if highest <= 0 else 0.0
    scale = (highest - base) or 1.0
    tiles = {name: Tiles.of("column", 1, shape[name]) for name in shape}
    shift = fixed_point_shift(1.0, max(tile.largest for tile in tiles.values()))
    rank, world_size = collectives.rank(), collectives.world_size()
    worth, sizes = {}, {}
    for name, score in scores.items():
        squares = ((score - base).clamp(min=0.0) / scale).square()
        worth[name] = local_means(squares, tiles[name], shift)
        first, last = shard_range(tiles[name].num_tiles, rank, world_size)
        sizes[name] = tiles[name].sizes(torch.arange(first, last, device=score.device))
    rows, group = {name: rows for name, (rows, _) in shape.items()}, groups_by(budget, shape)
    numel = {name: tile.num_tiles * rows[name] for name, tile in tiles.items()}
    if budget == "global":
        counts = [int(compute * sum(numel.values()))]
    else:
        counts = [max(rows[name], int(compute * count)) for name, count in numel.items()]
    chosen = select_local(worth, group, counts, sizes)
    return gather_indices(chosen, {name: tile.num_tiles for name, tile in tiles.items()})


def confine(
    scores: dict[str, Tensor], shape: Shapes, num_trainable: int, budget: str, compute: float
) -> None:
    """Leave no entry outside the best columns a chance to be selected, in place. Arguments as of `select`.

    Raises:
        UserError: a score is not finite, or the columns have too few entries.
    """
    require_finite(scores)
    columns = choose_columns(scores, shape, compute, budget)
    numel = {name: rows * width for name, (rows, width) in shape.items()}
    group, counts = budget_counts(numel, budget, num_trainable)
    room = [0] * len(counts)
    for name, number in group.items():
        room[number] += shape[name][0] * columns[name].numel()
    for name, number in group.items():
        if counts[number] > room[number]:
            of = f" of {name}" if budget == "per_layer" else ""
            larger = min(1.0, 2 * max(compute, num_trainable / sum(numel.values())))
            raise UserError(
                f"{counts[number]:,} entries{of} are wanted, the columns of mask.compute={compute} have "
                f"{room[number]:,}",
                where="mask.compute",
                fix=f"mask.compute={larger:.2g}, or a lower mask.density",
            )
    for name, score in scores.items():
        score.masked_fill_(~are_in(columns[name].to(score.device), shape[name]), OUTSIDE)


def are_in(columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """[local elements] bool: which elements of this rank's shard lie in these columns of the weight."""
    rows, width = shape
    start, stop = shard_range(rows * width, collectives.rank(), collectives.world_size())
    first, last = start // width, -(-stop // width)
    inside = torch.zeros(width, dtype=torch.bool, device=columns.device)
    inside[columns.to(torch.int64)] = True
    return inside.repeat(last - first)[start - first * width : stop - first * width]


def _range(scores: dict[str, Tensor]) -> tuple[float, float]:
    """Highest and lowest score over all ranks."""
    ends = [(score.max(), -score.min()) for score in scores.values() if score.numel()]
    own = torch.tensor([[high.item(), low.item()] for high, low in ends], dtype=torch.float64)
    own = own.amax(0) if ends else torch.full((2,), -torch.inf, dtype=torch.float64)
    highest, lowest = collectives.all_reduce_max(own.to(collectives.device())).tolist()
    return highest, -lowest
