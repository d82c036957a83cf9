"""The range test on quadratics whose largest stable rate is known, and on curves."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from speft_ds.config.train_config import OptimizerConfig
from speft_ds.sparse.optim.lr_schedule import RANGE, make_lr_schedule
from speft_ds.sparse.optim.optimizers import make_optimizer
from speft_ds.tune.lr_range import find_lr, has_diverged


def descend(curvature, top, steps, noise=0.0):
    """Rates and losses of a range test by our SGD on sum(curvature * x^2) / 2 per element, up to `top`."""
    settings = OptimizerConfig(name="sgd", lr=top, schedule="range_test")
    x, noisy = nn.Parameter(torch.ones(len(curvature))), np.random.default_rng(0)
    optimizer = make_optimizer(x, settings, entry_steps=False)
    schedule = make_lr_schedule(optimizer, settings, num_steps=steps)
    rates, losses = [], []
    for _ in range(steps):
        loss = (torch.tensor(curvature) * x.detach() ** 2).sum().item() / 2
        loss *= 1 + noise * noisy.standard_normal()
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(loss if math.isfinite(loss) else None)
        if has_diverged(losses):
            break
        x.grad = torch.tensor(curvature) * x.detach()
        optimizer.step()
        schedule.step()
    return rates, losses


def test_the_rate_rises_exponentially_to_that_of_the_recipe():
    rates, _ = descend([1e-9], top=1.0, steps=51)
    assert len(rates) == 51 and rates[-1] == pytest.approx(1.0) and rates[0] == pytest.approx(1 / RANGE)
    assert np.diff(np.log(rates)) == pytest.approx(math.log(RANGE) / 50)


@pytest.mark.parametrize("steps", [40, 100, 300])
@pytest.mark.parametrize("largest", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_quadratic_is_trained_below_its_largest_stable_rate(steps, largest, noise):
    """Which is 2 / (its largest curvature)."""
    curvature = [largest / n for n in (1, 2, 5, 10)]
    stable = 2 / largest
    rates, losses = descend(curvature, top=100 * stable, steps=steps, noise=noise)
    found = find_lr(rates, losses)
    assert len(losses) < steps  # it ended early
    assert stable / 2 < found.diverges < 20 * stable
    assert stable / 300 < found.suggestion < stable
    assert found.suggestion <= 1.05 * found.steepest  # it has two digits
    assert found.steepest <= found.lowest <= found.diverges


def test_the_suggestion_is_where_it_falls_fastest_or_a_tenth_of_where_it_diverges():
    decades = np.linspace(-5, 0, 101)
    fall = 2.0 - 1.0 / (1 + np.exp(-6 * (decades + 3)))  # steepest at 1e-3
    found = find_lr(list(10**decades), fall.tolist())
    assert found.diverges is None and found.suggestion == pytest.approx(1e-3, rel=0.3)
    rise = np.where(decades > -2.4, fall + 20 * (decades + 2.4), fall)
    found = find_lr(list(10**decades), rise.tolist())
    assert found.suggestion == pytest.approx(found.diverges / 10, rel=0.1) and found.diverges < 1e-2


def test_losses_that_are_not_finite_end_it_and_count_as_diverged():
    assert has_diverged([2.0, 1.9, None]) and has_diverged([2.0, 4.1]) and not has_diverged([2.0, 3.9])
    assert not has_diverged([])
    decades = np.linspace(-5, 0, 101)[:60]
    losses = [*(2.0 - 0.5 * (decades + 5)).tolist()[:-1], None]
    assert find_lr(list(10**decades), losses).diverges == pytest.approx(10 ** decades[-2], rel=0.3)


@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_a_loss_that_does_not_fall_clearly_gives_no_rate(slope):
    decades = np.linspace(-5, 0, 41)
    noise = np.random.default_rng(1).normal(0, 0.1, 41)
    with pytest.raises(ValueError):
        find_lr(list(10**decades), (2.0 + slope * decades + noise).tolist())
    with pytest.raises(ValueError):
        find_lr([1e-4] * 5, [2.0, 1.0, 0.5, 0.2, 0.1])
