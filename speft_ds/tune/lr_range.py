"""The learning-rate range test: what the losses under an exponentially rising rate say.

Smith, Cyclical Learning Rates for Training Neural Networks, 2017: a short run from a rate that does nothing
to one that diverges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speft_ds.report.run import is_run, read_run

WINDOW = 0.5  # decades of the rate on either side, over which the loss is smoothed
DIVERGED = 2.0  # times the first loss, from which on there is nothing more to learn
CLEAR = 3.0  # times the typical distance from the smoothed curve, that the loss must fall by


@dataclass(frozen=True)
class LrRange:
    """The result of a range test.

    Attributes:
        rates: of each step, rising; `losses`: after it; `smoothed`: their smoothed logarithm, raised again.
        steepest: the rate at which that logarithm falls fastest, by decade of the rate.
        lowest: the rate of the lowest smoothed loss.
        diverges: the rate above it at which half of its fall is lost again; None: not in this range.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float
    lowest: float
    diverges: float | None

    @property
    def suggestion(self) -> float:
        """The rate of the steepest fall, but not more than a tenth of one that diverges; of two digits."""
        return float(f"{min(self.steepest, (self.diverges or math.inf) / 10):.1e}")

    def in_words(self) -> list[tuple[str, float | None, str]]:
        """(what, rate, how it was found), the suggestion last."""
        top = self.rates[-1]
        lost = (
            "half of the fall (of its logarithm) is lost again"
            if self.diverges
            else f"not up to {top:.1e}, the last rate"
        )
        fall = f"{self.smoothed[0]:.4g} at first, {min(self.smoothed):.4g} here"
        return [
            ("lowest", self.lowest, f"of the smoothed loss: {fall}; {len(self.rates)} steps"),
            ("diverges", self.diverges, lost),
            ("steepest", self.steepest, "its logarithm falls fastest, by decade of the rate"),
            ("suggested", self.suggestion, "the steepest, or a tenth of where it diverges if that is less"),
        ]


def read_losses(folder: Path) -> tuple[list[float], list[float | None]]:
    """The rate of each step of a run so far, and the loss before it; None: not finite."""
    lines = read_run(folder).lines if is_run(folder) else []
    return [line["lr"] for line in lines], [line["loss"] for line in lines]


def has_diverged(losses: Sequence[float | None]) -> bool:
    """Whether the last loss (None: not finite) says that the run may end."""
    return bool(losses) and (losses[-1] is None or losses[-1] > DIVERGED * (losses[0] or 0.0))


def find_lr(rates: Sequence[float], losses: Sequence[float | None]) -> LrRange:
    """What the losses before each step and the rates of the steps say.

    Raises:
        ValueError: too few steps, or the loss did not fall clearly.
    """
    after = [math.inf if loss is None else loss for loss in losses[1:]]  # a step shows in the next loss
    if len(after) < 8:
        raise ValueError(f"{len(losses)} steps are too few")
    x, cap = np.log10(rates[: len(after)]), DIVERGED * losses[0]
    y = np.log(np.clip(after, 1e-12, cap))  # beyond it, no matter how far
    smoothed, slopes = np.array([_fit(x, y, place) for place in x]).T
    lowest = int(smoothed.argmin())
    start, best = smoothed[0], smoothed[lowest]
    noise = float(np.median(np.abs(y - smoothed)[: lowest + 1]))
    if start - best <= CLEAR * noise:
        fall = f"{math.exp(start):.4g} at first, {math.exp(best):.4g} at the lowest"
        raise ValueError(f"the loss does not fall clearly: {fall}")
    lost = [number for number in range(lowest, len(x)) if smoothed[number] > (start + best) / 2]
    if not lost and has_diverged(losses):
        lost = [len(x) - 1]
    return LrRange(
        rates=list(rates[: len(after)]),
        losses=np.exp(y).tolist(),
        smoothed=np.exp(smoothed).tolist(),
        steepest=rates[int(slopes[: lowest + 1].argmin())],
        lowest=rates[lowest],
        diverges=rates[lost[0]] if lost else None,
    )


def _fit(x: np.ndarray, y: np.ndarray, place: float) -> tuple[float, float]:
    """Value and slope, at a place, of the straight line through the points around it."""
    near = np.abs(x - place) <= WINDOW
    slope, value = np.polyfit(x[near] - place, y[near], 1)
    return value, slope
