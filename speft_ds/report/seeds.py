"""Runs that differ in nothing but the seed, taken together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from speft_ds.evaluation.scores import Score, in_text
from speft_ds.report.run import Run, is_number
from speft_ds.report.tables import unique_tails

NOT_OF_A_GROUP = ("seed", "output_dir", "name")


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on one base, with several seeds or one.

    Attributes:
        label: the name of its first run, and how many there are.
        recipe: without the keys that do not matter, by dotted key.
    """

    label: str
    runs: Sequence[Run]
    recipe: dict[str, Any]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.setting("seed")) for run in self.runs)

    def values(self, value: Callable[[Run], float | None]) -> list[float]:
        """A number of each run that has it."""
        return [found for run in self.runs if (found := value(run)) is not None and math.isfinite(found)]

    def scores(self, key: tuple[str, str, str], moment: str = "after") -> list[Score]:
        """A score of each run that has it, `before` or `after`."""
        evaluations = [getattr(run.evaluations, moment) for run in self.runs]
        return [score for found in evaluations if found and (score := found.score(key))]


@dataclass(frozen=True)
class Mean:
    """A score over the runs of a group.

    Attributes:
        deviation: sample standard deviation over seeds; None of a single run.
        stderr: lm-eval's, over documents: the mean of the runs'; None where it is not known.
    """

    value: float
    deviation: float | None
    stderr: float | None
    num_runs: int
    is_share: bool

    @property
    def error(self) -> float | None:
        """For comparing: documents and seeds together, √(stderr² + deviation²/n); None: not known."""
        seeds = self.deviation**2 / self.num_runs if self.deviation is not None else 0.0
        if self.stderr is None and self.deviation is None:
            return None
        return math.sqrt((self.stderr or 0.0) ** 2 + seeds)

    @property
    def text(self) -> str:
        text = in_text(self.value, self.stderr, self.is_share)
        if self.deviation is None:
            return text
        deviation = f"{100 * self.deviation:.1f}" if self.is_share else f"{self.deviation:.2g}"
        return f"{text}, sd {deviation} (n={self.num_runs})"


def mean_of(scores: Sequence[Score]) -> Mean | None:
    """The mean of one score over runs; None where there is none."""
    if not scores:
        return None
    values = [score.value for score in scores]
    errors = [score.stderr for score in scores if score.stderr is not None and math.isfinite(score.stderr)]
    return Mean(
        value=mean(values),
        deviation=stdev(values) if len(values) > 1 else None,
        stderr=mean(errors) if len(errors) == len(scores) else None,
        num_runs=len(scores),
        is_share=all(score.is_share for score in scores),
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by recipe, but for the seed, and by base; in the order in which they were named."""
    names = ["/".join(tail) for tail in unique_tails([run.folder.absolute().parts for run in runs])]
    groups: dict[str, list[tuple[str, Run]]] = {}
    for name, run in zip(names, runs, strict=True):
        key = [flat(run.recipe), run.fact("base.fingerprint"), run.folder.name if not run.recipe else None]
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append((name, run))
    found = []
    for members in groups.values():
        first = members[0][0]
        seeds = {run.setting("seed") for _, run in members if is_number(run.setting("seed"))}
        what = "seeds" if len(seeds) == len(members) else "runs"
        label = f"{first} ({len(members)} {what})" if len(members) > 1 else first
        found.append(Group(label, [run for _, run in members], flat(members[0][1].recipe)))
    return found


def flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe by dotted key, without what runs of one group may differ in."""
    leaves: dict[str, Any] = {}
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            leaves |= flat(value, f"{key}.")
        elif key not in NOT_OF_A_GROUP:
            leaves[key] = value
    return leaves


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """Keys whose values are not the same in all groups, in the order of the recipe."""
    keys = list(dict.fromkeys(key for group in groups for key in group.recipe))
    return [key for key in keys if len({repr(group.recipe.get(key, "-")) for group in groups}) > 1]


def without_doubles(folders: Sequence[Path]) -> list[Path]:
    """Each folder once, in order."""
    return list({os.path.realpath(folder): folder for folder in reversed(folders)}.values())[::-1]
