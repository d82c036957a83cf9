"""Means, errors, paired differences and plateaus, against scipy and numpy."""

import math

import numpy
import pytest
from scipy import stats

from speft_ds.study.statistics import best_rate, estimate, paired_difference, plateau


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 20])
def test_against_scipy(num_seeds):
    draw = numpy.random.default_rng(num_seeds)
    one, other = draw.normal(2.0, 0.3, num_seeds), draw.normal(1.9, 0.3, num_seeds)
    found = estimate(one.tolist())
    assert found.mean == pytest.approx(one.mean()) and found.error == pytest.approx(stats.sem(one))
    expected = stats.t.interval(0.95, num_seeds - 1, one.mean(), stats.sem(one))
    assert found.interval == pytest.approx(expected)
    pairs = [dict(enumerate(values.tolist())) for values in (one, other)]
    found, test = paired_difference(*pairs), stats.ttest_rel(one, other)
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.is_clear == (test.pvalue < 0.05)


def test_seeds_that_only_one_has_are_left_out():
    found = paired_difference({1: 5.0, 2: 7.0, 3: 100.0}, {4: -100.0, 2: 4.0, 1: 1.0})
    assert (found.mean, found.num_seeds) == (3.5, 2)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_one_seed_says_nothing_of_the_spread():
    found = estimate([3.0])
    assert (found.mean, found.error, found.interval, found.is_clear) == (3.0, None, None, False)
    assert estimate([]) is None


def test_the_plateau_against_a_fine_grid():
    """Where the broken line through the scores, over the logarithm of the rate, is high enough."""
    draw = numpy.random.default_rng(0)
    for _ in range(50):
        rates = numpy.sort(10 ** draw.uniform(-5, -1, 6))
        scores = -2 - numpy.abs(numpy.log(rates / 1e-3)) * draw.uniform(0.01, 0.1) + draw.normal(0, 0.01, 6)
        fine = numpy.linspace(math.log(rates[0]), math.log(rates[-1]), 200_001)
        is_high = numpy.interp(fine, numpy.log(rates), scores) >= scores.max() * 1.01
        best = numpy.searchsorted(fine, math.log(rates[scores.argmax()]))
        low = best - (numpy.argmin(is_high[best::-1]) or best + 1) + 1
        high = best + (numpy.argmin(is_high[best:]) or len(fine) - best) - 1
        found = plateau(dict(zip(rates.tolist(), scores.tolist(), strict=True)), 0.01)
        assert math.log(found.low) == pytest.approx(fine[max(low, 0)], abs=1e-3)
        assert math.log(found.high) == pytest.approx(fine[min(high, len(fine) - 1)], abs=1e-3)
        assert found.is_open == (low <= 0 or high >= len(fine) - 1)


def test_a_run_that_failed_ends_the_plateau():
    scores = {1e-3: -2.0, 3e-3: -1.0, 9e-3: -math.inf}
    found = plateau(scores, 0.5)
    assert (found.high, found.is_open) == (3e-3, False) and 1e-3 < found.low < 3e-3
    assert plateau({1e-3: -math.inf}, 0.5) is None and best_rate({1e-3: -math.inf}) is None
    assert best_rate({2e-3: 1.0, 1e-3: 1.0}) == 1e-3
