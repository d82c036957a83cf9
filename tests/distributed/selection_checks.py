"""What runs on every rank to test selection on given scores, and a dense selection to compare it with."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, product

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.selection.columns import confine
from speft_ds.selection.topk import is_top, select
from speft_ds.zero.shards import shard_range

Shapes = dict[str, tuple[int, int]]


def own_range(scores: Tensor) -> tuple[int, int]:
    """[start, stop) of this rank's shard of flat scores."""
    return shard_range(scores.numel(), collectives.rank(), collectives.world_size())


def local_part(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of flat scores, on its device."""
    return {name: s[slice(*own_range(s))].to(collectives.device()) for name, s in scores.items()}


def cut(shape: tuple[int, int], granularity: str, block_size: int) -> list[list[int]]:
    """The flat indices of each tile of a weight, row by row of tiles."""
    rows, columns = shape
    height = {"element": 1, "row": 1, "block": block_size, "column": rows}[granularity]
    width = {"element": 1, "column": 1, "block": block_size, "row": columns}[granularity]
    return [
        [
            r * columns + c
            for r, c in product(range(rows)[top : top + height], range(columns)[left : left + width])
        ]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def shares(sizes: list[int], wanted: int) -> list[int]:
    """`wanted` in proportion to the sizes: rounded down, then one more by the largest remainder."""
    exact = [Fraction(wanted * size, sum(sizes)) for size in sizes]
    counts = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: wanted - sum(counts)]:
        counts[i] += 1
    return counts


def best(groups: list[list[tuple]], counts: list[int]) -> dict[str, list[int]]:
    """Of each group's tiles (weight, indices, score), the best, up to the first that does not fit."""
    chosen: dict[str, list[int]] = {}
    for tiles, left in zip(groups, counts, strict=True):
        for name, indices, _ in sorted(tiles, key=lambda tile: -tile[2]):  # stable: ties by order
            if len(indices) > left:
                break
            left -= len(indices)
            chosen[name] = chosen.get(name, []) + indices
    return chosen


def dense_selection(
    scores: dict[str, Tensor],
    shapes: Shapes,
    wanted: list[int],
    budget: str,
    granularity: str,
    block_size: int,
) -> dict[int, dict[str, list[int]]]:
    """The chosen flat indices of every weight, by how many are wanted; means are exact fractions."""
    by_weight = []
    for name, shape in shapes.items():
        exact = [Fraction(value) for value in scores[name].tolist()]
        tiles = cut(shape, granularity, block_size)
        by_weight.append([(name, tile, sum(exact[i] for i in tile) / len(tile)) for tile in tiles])
    return {count: choose(by_weight, shapes, count, budget) for count in wanted}


def choose(by_weight: list[list[tuple]], shapes: Shapes, wanted: int, budget: str) -> dict[str, list[int]]:
    """The flat indices that a budget chooses from each weight's tiles (weight, indices, score)."""
    sizes = [rows * columns for rows, columns in shapes.values()]
    if budget == "global":
        groups, counts = [list(chain.from_iterable(by_weight))], [wanted]
    elif budget == "per_layer":
        groups, counts = by_weight, shares(sizes, wanted)
    else:
        groups, counts = [], []
        for tiles, (rows, columns) in zip(by_weight, shapes.values(), strict=True):
            groups += [tiles[row * columns :][:columns] for row in range(rows)]
            counts += [round(Fraction(wanted * columns, sum(sizes)))] * rows
    chosen = best(groups, counts)
    return {name: sorted(chosen.get(name, [])) for name in shapes}


def dense_confined(
    scores: dict[str, Tensor], shapes: Shapes, wanted: int, budget: str, compute: float
) -> dict[str, list[int]]:
    """What is chosen inside the columns that are worth most, in exact fractions."""
    exact = {name: [Fraction(value) for value in score.tolist()] for name, score in scores.items()}
    everything = list(chain.from_iterable(exact.values()))
    base = min(everything) if max(everything) <= 0 else Fraction(0)
    columns, sizes = [], [rows * width for rows, width in shapes.values()]
    for name, shape in shapes.items():
        worth = [max(value - base, Fraction(0)) ** 2 for value in exact[name]]
        tiles = cut(shape, "column", 1)
        columns.append([(name, tile, sum(worth[i] for i in tile) / len(tile)) for tile in tiles])
    if budget == "global":
        inside = best([list(chain.from_iterable(columns))], [int(compute * sum(sizes))])
    else:
        least = [rows for rows, _ in shapes.values()]
        counts = [max(a, int(compute * size)) for a, size in zip(least, sizes, strict=True)]
        inside = best(columns, counts)
    entries = [[(name, [i], exact[name][i]) for i in sorted(inside.get(name, []))] for name in shapes]
    return choose(entries, shapes, wanted, budget)


def check_confined(
    shapes: Shapes, scores: dict[str, Tensor], expected: dict[int, dict], budget: str, compute: float
) -> None:
    """Selection inside few columns is the dense one, for each number of entries wanted."""
    for wanted, indices in expected.items():
        parts = {name: part.clone() for name, part in local_part(scores).items()}
        confine(parts, shapes, wanted, budget, compute)
        mask = select(parts, shapes, wanted, budget)
        assert {name: index.tolist() for name, index in mask.index.items()} == indices, wanted
        assert budget != "global" or mask.compute <= compute


def check_confined_refuses(shapes: Shapes, scores: dict[str, Tensor], wanted: int, compute: float) -> str:
    """Where the UserError says that it is, of columns that have too few entries."""
    try:
        confine(local_part(scores), shapes, wanted, "global", compute)
    except UserError as error:
        return error.where
    return ""


def check_select(
    shapes: Shapes, scores: dict[str, Tensor], expected: dict[int, dict[str, list[int]]], **choice
) -> None:
    """Selection on sharded scores is the dense one, for each number of entries wanted."""
    for wanted, indices in expected.items():
        mask = select(local_part(scores), shapes, wanted, **choice)
        assert {name: index.tolist() for name, index in mask.index.items()} == indices, wanted
        assert mask.shape == shapes, wanted
        if (choice["budget"], choice["granularity"]) == ("global", "element"):
            parts = local_part(scores)
            lengths = [part.numel() for part in parts.values()]
            flat = is_top(torch.cat([*parts.values()]), lengths, wanted)
            for name, part in zip(parts, flat.split(lengths), strict=True):
                start, stop = own_range(scores[name])
                own = [index - start for index in indices[name] if start <= index < stop]
                assert part.nonzero()[:, 0].tolist() == own, (wanted, name)


def check_select_many(shapes: Shapes, scores: dict[str, Tensor], wanted: list[int]) -> None:
    """The same for too many scores to sort as fractions: a stable sort, which keeps ties in order."""
    flat = torch.cat([*scores.values()])
    order = flat.sort(descending=True, stable=True).indices
    for count in wanted:
        index = select(local_part(scores), shapes, count).index
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order[:count]] = True
        expected = chosen.split([score.numel() for score in scores.values()])
        for name, where in zip(scores, expected, strict=True):
            assert torch.equal(index[name].to("cpu", torch.int64), where.nonzero()[:, 0]), (name, count)


def check_select_refuses(shapes: Shapes, scores: dict[str, Tensor], wanted: int) -> str:
    """The message of the UserError that a selection raises on this rank."""
    try:
        select(local_part(scores), shapes, wanted)
    except UserError as error:
        return str(error)
    return ""
