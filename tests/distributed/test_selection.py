"""Exact top-k over sharded scores against sorting the gathered ones."""

import pytest
import torch

from distributed import checks

SHAPES = {"a": (7, 5), "b": (3, 11), "c": (1, 2), "d": (13, 9)}


def make_scores(kind: str) -> dict:
    generator = torch.Generator().manual_seed(5)
    numel = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    if kind == "ties":
        return {n: torch.randint(-2, 3, (k,), generator=generator).float() for n, k in numel.items()}
    if kind == "equal":
        return {n: torch.full((k,), -1.5) for n, k in numel.items()}
    scores = {n: torch.randn(k, generator=generator) for n, k in numel.items()}
    if kind == "extreme":  # subnormal, huge, signed zeros
        scores["a"][:4] = torch.tensor([1e-42, -1e-42, 3e38, -3e38])
        scores["b"][:4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    return scores


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
def test_topk(ranks, world_size, budget, kind):
    total = sum(rows * columns for rows, columns in SHAPES.values())
    counts = [0, 1, 2, 17, 93, total - 1, total]
    ranks(world_size)(
        checks.check_topk, shapes=SHAPES, scores=make_scores(kind), counts=counts, budget=budget
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_refuses_scores_that_are_not_finite(ranks, world_size):
    scores = make_scores("distinct")
    scores["d"][0] = float("nan")  # in one rank's shard; every rank must hear of it
    messages = ranks(world_size)(checks.check_select_refuses, shapes=SHAPES, scores=scores, count=3)
    assert all("not finite" in message for message in messages)
