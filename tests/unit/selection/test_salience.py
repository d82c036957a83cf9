"""Scores as functions of one tensor, and the registry of metrics."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.config.mask_config import NEEDS_DATA, MaskConfig
from speft_ds.data.collate import IGNORED
from speft_ds.errors import UserError
from speft_ds.model.kinds import find_weights
from speft_ds.selection.salience import SALIENCE, low_rank, low_rank_shards, uniform

CPU = torch.device("cpu")


def test_every_metric_of_the_schema_is_there():
    assert set(SALIENCE) == set(get_args(MaskConfig.model_fields["salience"].annotation))
    assert set(SALIENCE) > NEEDS_DATA


def test_what_few_bits_cost_is_asked_of_weights_in_few_bits():
    targets = {"head.weight": find_weights(torch.nn.Linear(4, 4))["weight"]}
    with pytest.raises(UserError) as caught:
        SALIENCE["quant_error"](SimpleNamespace(targets=targets))
    assert caught.value.where == "mask.salience=quant_error" and "mask.targets" in caught.value.fix


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50), st.integers(0, 2**63 - 1))
def test_a_random_score_depends_on_its_place_alone(start, before, length, seed):
    whole = uniform(seed, "w", start, start + before + length, CPU)
    assert torch.equal(whole[before:], uniform(seed, "w", start + before, start + before + length, CPU))
    assert whole.dtype == torch.float32 and bool(((whole >= 0) & (whole < 1)).all())


@pytest.mark.parametrize("start", [0, 2**31 - 2**16, 2**40])
def test_random_scores_are_uniform_and_independent(start):
    n = 2**17
    scores = uniform(0, "w", start, start + n, CPU)
    counts = torch.histc(scores, bins=16, min=0, max=1)
    assert (counts - n / 16).square().sum() / (n / 16) < 45  # chi-squared of 15 degrees: 1 in 10,000
    others = [scores.roll(1), scores.roll(35), uniform(1, "w", start, start + n, CPU)]
    others += [uniform(0, "v", start, start + n, CPU), uniform(0, "w", start + n, start + 2 * n, CPU)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([scores, other]))[0, 1]
        assert abs(correlation) < 4 / n**0.5


def svd_truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("shape", [(9, 9), (6, 23), (23, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_is_the_truncated_svd(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rank in (1, 3, 6):
        found = low_rank(weight, rank)
        assert found.dtype == torch.float64 and found.shape == weight.shape
        assert torch.allclose(found, svd_truncated(weight, rank), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_a_weight_of_lower_rank_is_its_own_approximation(shape):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    assert torch.allclose(low_rank(weight, 4).float(), weight, atol=1e-6)
    assert torch.equal(low_rank(torch.zeros(shape), 2), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("world_size", [1, 2, 4, 6])
def test_low_rank_scores_come_in_shards(shape, world_size):
    """35 elements: on 2, 4 and 6 ranks the last shard is padded."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    size = -(-35 // world_size)
    scores = low_rank_shards(weight, world_size, 2)
    assert scores.shape == (world_size, size) and scores.dtype == torch.float32
    expected = svd_truncated(weight, 2).abs().float().flatten()
    assert torch.allclose(scores.flatten()[:35], expected, rtol=1e-6, atol=1e-12)
    assert bool((scores.flatten()[35:] == 0).all())


def fisher_of(labels: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    scorer = SimpleNamespace(
        rows=lambda: SimpleNamespace(rows=[None, None]), accumulate=lambda dense: dense(labels, *factors)
    )
    return SALIENCE["fisher"](scorer)


def test_fisher_squares_the_gradient_of_each_sample():
    x, grad_y, labels = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 5),
        torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 3]]),
    )
    expected = ((grad_y[0].T @ x[0] / 2) ** 2 + (grad_y[1].T @ x[1]) ** 2) / 2
    torch.testing.assert_close(fisher_of(labels, x, grad_y), expected)
    with pytest.raises(ValueError):  # the tokens of both are mixed
        fisher_of(labels, x.flatten(0, 1), grad_y.flatten(0, 1))


def test_fisher_of_one_sample_whose_tokens_are_sorted_by_expert():
    stack, x, grad_y = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4), torch.randn(6, 5)
    (torch.cat([x[:4] @ stack[0].T, x[4:] @ stack[1].T]) * grad_y).sum().backward()
    scores = fisher_of(torch.tensor([[IGNORED, 1, 2, 3]]), x, grad_y, torch.tensor([4, 6]))
    torch.testing.assert_close(scores, (stack.grad.flatten(0, 1) / 3) ** 2 / 2)
