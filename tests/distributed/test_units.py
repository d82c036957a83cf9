"""Exact selection of units that lie in several weights, against a dense one on the gathered scores."""

from fractions import Fraction
from functools import lru_cache

import pytest
import torch

from distributed.selection_checks import local_part, shares
from speft_ds.errors import UserError
from speft_ds.selection.units import Units, select_units
from speft_ds.sparse.tiles import Tiles

# Two modules in a layer, units of three sizes, weights that no world size divides.
MODULES = [  # name -> rows, columns, rows and columns of a band
    {"layers.0.a": (6, 5, 2, 5), "layers.0.b": (7, 9, 7, 3)},
    {"layers.0.c": (4, 1, 1, 1), "layers.0.d": (3, 4, 3, 1), "layers.0.e": (4, 3, 1, 3)},
    {"layers.1.a": (10, 5, 2, 5), "layers.1.b": (7, 5, 7, 1)},
]
SHAPES = {name: (rows, columns) for module in MODULES for name, (rows, columns, _, _) in module.items()}
TOTAL = sum(rows * columns for rows, columns in SHAPES.values())
UNITS = [Units({name: Tiles((r, c), h, w) for name, (r, c, h, w) in module.items()}) for module in MODULES]


def make_scores(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    numel = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    if kind == "equal":
        return {name: torch.full((k,), -1.5) for name, k in numel.items()}
    if kind == "cancelling":  # sums in floating point would depend on their order
        return {
            name: (torch.randint(-1, 2, (k,), generator=generator) * 2.0**40) + torch.arange(k) % 3
            for name, k in numel.items()
        }
    return {name: torch.randn(k, generator=generator) for name, k in numel.items()}


@lru_cache
def dense(kind: str, wanted: int, budget: str) -> dict[str, list[int]]:
    """The entries of the best units, up to the first that does not fit."""
    scores, by_layer = make_scores(kind), {0: [], 1: []}
    for module in MODULES:
        rows, columns, height, width = next(iter(module.values()))
        for unit in range(rows // height * (columns // width)):
            entries = []
            for name, (rows, columns, height, width) in module.items():
                inside = [(r, c) for r in range(rows) for c in range(columns)]
                is_rows = height < rows
                own = [r * columns + c for r, c in inside if (r // height if is_rows else c // width) == unit]
                entries += [(name, i) for i in own]
            mean = sum(Fraction(scores[name][i].item()) for name, i in entries) / len(entries)
            by_layer[int(name.split(".")[1])].append((-mean, entries))
    groups, counts = list(by_layer.values()), [wanted]
    if budget == "global":
        groups = [groups[0] + groups[1]]
    else:
        counts = shares([sum(len(entries) for _, entries in group) for group in groups], wanted)
    chosen = {name: [] for name in SHAPES}
    for group, left in zip(groups, counts, strict=True):
        for _, entries in sorted(group, key=lambda unit: unit[0]):
            left -= len(entries)
            if left < 0:
                break
            for name, i in entries:
                chosen[name].append(i)
    return {name: sorted(found) for name, found in chosen.items()}


def check_units(scores: dict[str, torch.Tensor], expected: dict[int, dict], budget: str) -> None:
    for wanted, indices in expected.items():
        mask = select_units(local_part(scores), UNITS, SHAPES, wanted, budget)
        assert {name: index.tolist() for name, index in mask.index.items()} == indices, wanted
        assert mask.shape == SHAPES


def check_not_finite(scores: dict[str, torch.Tensor]) -> str:
    try:
        select_units(local_part(scores), UNITS, SHAPES, 50, "global")
    except UserError as error:
        return error.where
    return ""


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("kind", ["distinct", "equal", "cancelling"])
def test_units_are_the_dense_choice(ranks, world_size, budget, kind):
    expected = {wanted: dense(kind, wanted, budget) for wanted in (7, 31, 60, 100, TOTAL)}
    assert [sum(map(len, each.values())) for each in expected.values()][-1] == TOTAL
    ranks(world_size)(check_units, scores=make_scores(kind), expected=expected, budget=budget)


def test_scores_that_are_not_finite_are_refused(ranks):
    scores = make_scores("distinct")
    scores["layers.1.b"][0] = float("nan")  # in one rank's shard; every rank must hear of it
    assert ranks(2)(check_not_finite, scores=scores) == ["mask.salience"] * 2
