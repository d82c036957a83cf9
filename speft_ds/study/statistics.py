"""What several seeds say: means and paired differences with their errors; the plateau of learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None  # the standard error; None of a single seed
    num_seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean lies with CONFIDENCE, by Student's t; None of a single seed."""
        if self.error is None:
            return None
        from scipy.stats import t  # late: it takes a second

        reach = float(t.ppf((1 + CONFIDENCE) / 2, self.num_seeds - 1)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside of the interval."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of a value per seed; None of no seed."""
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(mean(values), error, len(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean difference to a reference over the seeds that both have; None where there is no such seed."""
    return estimate([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])


@dataclass(frozen=True)
class Plateau:
    """The rates around the best one that are hardly worse; open where it reaches the last rate tried."""

    low: float
    high: float
    is_open: bool

    def __str__(self) -> str:
        return f"{'>= ' * self.is_open}x{self.high / self.low:.2g} ({self.low:.2g} to {self.high:.2g})"


def best_rate(scores: Mapping[float, float]) -> float | None:
    """The rate with the highest score, the lowest of several; None where no score is finite."""
    finite = [rate for rate in sorted(scores) if math.isfinite(scores[rate])]
    return max(finite, key=scores.__getitem__, default=None)


def plateau(scores: Mapping[float, float], tolerance: float) -> Plateau | None:
    """The rates around the best whose score is at most `tolerance` of the best one's size below it.

    Between two rates, scores are on a line over the logarithm of the rate.

    Args:
        scores: by rate, higher is better; -inf of a run that failed.
    """
    best = best_rate(scores)
    if best is None:
        return None
    least = scores[best] - tolerance * abs(scores[best])
    sides = [sorted(rate for rate in scores if rate >= best)]
    sides.append(sorted((rate for rate in scores if rate <= best), reverse=True))
    (high, high_open), (low, low_open) = (_reach(side, scores, least) for side in sides)
    return Plateau(low, high, high_open or low_open)


def _reach(rates: Sequence[float], scores: Mapping[float, float], least: float) -> tuple[float, bool]:
    """How far scores stay at or above `least` along these rates, the best first; whether to their end."""
    for near, far in pairwise(rates):
        if scores[far] < least:
            share = (scores[near] - least) / (scores[near] - scores[far])
            return near * (far / near) ** share, False
    return rates[-1], True
