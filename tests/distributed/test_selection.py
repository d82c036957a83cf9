"""Exact selection over sharded scores against a dense one on the gathered scores."""

from functools import lru_cache

import pytest
import torch

from distributed import selection_checks as checks

# On 4 ranks `c` and `f` leave a rank without elements, and the row of `e` is cut three times.
SHAPES = {"a": (7, 5), "b": (3, 11), "c": (1, 2), "d": (13, 9), "e": (1, 23), "f": (3, 1)}
TOTAL = sum(rows * columns for rows, columns in SHAPES.values())


def make_scores(kind: str) -> dict[str, torch.Tensor]:
    """Flat scores of every weight; those of `huge` and `tiny` are small integers times a power of two."""
    generator = torch.Generator().manual_seed(5)
    numel = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    if kind == "ties":
        return {n: torch.randint(-2, 3, (k,), generator=generator).float() for n, k in numel.items()}
    if kind == "equal":
        return {n: torch.full((k,), -1.5) for n, k in numel.items()}
    if kind in ("huge", "tiny"):
        scale = {"huge": 2.0**115, "tiny": 2.0**-135}[kind]
        return {n: torch.randint(-2000, 2000, (k,), generator=generator) * scale for n, k in numel.items()}
    scores = {n: torch.randn(k, generator=generator) for n, k in numel.items()}
    if kind == "extreme":  # subnormal, huge, signed zeros
        scores["a"][:4] = torch.tensor([1e-42, -1e-42, 3e38, -3e38])
        scores["b"][:4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    return scores


@lru_cache
def expected(kind: str, wanted: tuple[int, ...], budget: str, granularity: str, block_size: int) -> dict:
    """What a dense selection chooses, for all world sizes."""
    return checks.dense_selection(make_scores(kind), SHAPES, wanted, budget, granularity, block_size)


def compare(ranks, world_size: int, kind: str, wanted: tuple[int, ...], **choice) -> None:
    wanted = expected(kind, wanted, **choice)
    ranks(world_size)(checks.check_select, shapes=SHAPES, scores=make_scores(kind), expected=wanted, **choice)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", ["global", "per_layer", "per_row"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
def test_elements(ranks, world_size, budget, kind):
    # A quota that gives a row nothing is refused before scoring.
    at_zero = int(sum((score >= 0).sum() for score in make_scores(kind).values()))
    wanted = (107, 150, TOTAL) if budget == "per_row" else (0, 1, 17, at_zero, at_zero + 1, TOTAL)
    compare(ranks, world_size, kind, wanted, budget=budget, granularity="element", block_size=16)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize(
    ("granularity", "block_size"), [("block", 4), ("block", 16), ("row", 2), ("column", 2)]
)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "huge", "tiny"])
def test_units(ranks, world_size, budget, granularity, block_size, kind):
    """Units of unequal sizes: blocks of 4 fit no weight, rows have 1 to 23 entries."""
    wanted = (1, 23, 50, 117, TOTAL)
    compare(ranks, world_size, kind, wanted, budget=budget, granularity=granularity, block_size=block_size)


@pytest.mark.parametrize("granularity", ["block", "row", "column"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_of_summation_does_not_count(ranks, world_size, granularity):
    """All tiles hold the same scores in other orders: they tie, which sums in floating point would not."""
    shapes = {"a": (9, 9), "b": (9, 9)}
    generator = torch.Generator().manual_seed(6)
    scores = {name: torch.empty(81) for name in shapes}
    large = torch.tensor([1e9, -1e9, 3e8, -3e8])  # they cancel, and take digits of the others with them
    values = torch.cat([large, 0.01 * torch.randn(5, generator=generator)])
    for name, shape in shapes.items():
        for tile in checks.cut(shape, granularity, 3):
            scores[name][tile] = values[torch.randperm(9, generator=generator)]
    choice = {"budget": "global", "granularity": granularity, "block_size": 3}
    expected = checks.dense_selection(scores, shapes, [9, 40, 100], **choice)
    ranks(world_size)(checks.check_select, shapes=shapes, scores=scores, expected=expected, **choice)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_many_elements(ranks, world_size, kind):
    """More than are handled at once."""
    generator = torch.Generator().manual_seed(8)
    scores = {"a": torch.randn(600_000, generator=generator), "b": torch.randn(1, generator=generator)}
    if kind == "ties":
        scores = {name: (score * 9).round() for name, score in scores.items()}
    shapes = {"a": (750, 800), "b": (1, 1)}
    wanted = [1, 77_777, 300_001, 600_001]
    ranks(world_size)(checks.check_select_many, shapes=shapes, scores=scores, wanted=wanted)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "tiny"])
def test_entries_in_few_columns(ranks, world_size, budget, kind):
    """Weights of unequal width, a weight with room for no column, ties, scores that are all negative."""
    scores = make_scores(kind)
    for compute, wanted in ((0.2, (1, 17)), (0.6, (100,)), (1.0, (TOTAL,))):
        expected = {n: checks.dense_confined(scores, SHAPES, n, budget, compute) for n in wanted}
        choice = {"budget": budget, "compute": compute}
        ranks(world_size)(checks.check_confined, shapes=SHAPES, scores=scores, expected=expected, **choice)


def test_columns_with_too_few_entries_are_refused(ranks):
    for compute, wanted in ((0.004, 1), (0.1, 40)):  # less than a column; less than is wanted
        where = ranks(2)(
            checks.check_confined_refuses,
            shapes=SHAPES,
            scores=make_scores("distinct"),
            wanted=wanted,
            compute=compute,
        )
        assert where == ["mask.compute"] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("world_size", [1, 2])
def test_refuses_scores_that_are_not_finite(ranks, world_size, value):
    scores = make_scores("distinct")
    scores["d"][0] = value  # in one rank's shard; every rank must hear of it
    messages = ranks(world_size)(checks.check_select_refuses, shapes=SHAPES, scores=scores, wanted=3)
    assert all("not finite" in message for message in messages)
