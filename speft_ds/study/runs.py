"""The runs of a study: its settings, and the runs of each that are known to be needed so far.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from speft_ds.config.load_recipe import as_override, load_recipe
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.errors import UserError, gather
from speft_ds.study.statistics import best_rate
from speft_ds.study.study_config import RATE, SEED, VALIDATION_LOSS, Overrides, RatesConfig, StudyConfig
from speft_ds.training.checkpoint.resume import SAFE_TO_CHANGE

MAX_NAME = 120  # characters of a run folder's name


@dataclass(frozen=True)
class Setting:
    """A variant at one point of the axes: what is run with several rates and seeds."""

    variant: str
    point: Overrides

    @property
    def label(self) -> str:
        return ", ".join([self.variant, *(as_override(key, value) for key, value in self.point.items())])


@dataclass(frozen=True)
class StudyRun:
    """One run; its `key` is a hash of what it learns: not of where it runs, or on how many ranks."""

    setting: Setting
    overrides: list[str]
    recipe: Recipe
    key: str

    @property
    def rate(self) -> float:
        return self.recipe.optimizer.lr

    @property
    def name(self) -> str:
        """Of its folder."""
        axes = [f"{key.rpartition('.')[2]}={value}" for key, value in self.setting.point.items()]
        words = [self.setting.variant, *axes, f"lr={self.rate:g}", f"seed={self.recipe.seed}"]
        readable = re.sub(r"[^\w.=+-]+", "_", "-".join(words), flags=re.ASCII)[:MAX_NAME]
        return f"{readable}-{self.key[:6]}"


@dataclass(frozen=True)
class Progress:
    """The runs of a setting that are known to be needed.

    Attributes:
        swept: those of the rates, with the first seed; seeds: those of the best rate, one per seed.
        best_rate: None while rates are still to be tried, or where no run of any rate came to a number.
    """

    swept: list[StudyRun]
    seeds: list[StudyRun]
    best_rate: float | None

    @property
    def runs(self) -> list[StudyRun]:
        return list({run.key: run for run in (*self.swept, *self.seeds)}.values())


class Grid:
    """All settings of a study, and their runs."""

    def __init__(self, study: StudyConfig):
        self.study = study
        variants = study.variants or {Path(study.recipe).stem: {}}
        points = [dict(zip(study.axes, values, strict=True)) for values in product(*study.axes.values())]
        self.settings = [Setting(variant, point) for variant in variants for point in points]
        self._made: dict[tuple[str, float | None, int | None], StudyRun] = {}

    def counterpart(self, setting: Setting) -> Setting | None:
        """What a setting is compared with: it differs from it by the study's reference alone."""
        reference = self.study.reference
        for key, values in self.study.axes.items():
            for value in values:
                if as_override(key, value) == reference:
                    return Setting(setting.variant, setting.point | {key: value})
        return None if reference is None else Setting(reference, setting.point)

    def first_runs(self) -> list[StudyRun]:
        """The runs that are known to be needed before anything ran.

        Raises:
            RecipeError: the problems of all recipes; a metric that no run has; several bases.
        """
        title, nothing = f"study {self.study.name}", {}.get
        runs = [
            run
            for each in gather([partial(self.progress, s, nothing) for s in self.settings], title)
            for run in each.runs
        ]
        gather([partial(self._check, run, runs[0]) for run in runs], title)
        return runs

    def progress(self, setting: Setting, score: Callable[[str], float | None]) -> Progress:
        """The runs of a setting that are known to be needed.

        Args:
            score: of a run that has ended, by its key, higher is better, -inf of one that failed; None of the
                others.
        """
        rates, seeds = self.study.rates, self.study.seeds or [None]
        if rates is None:
            runs = [self.run(setting, None, seed) for seed in seeds]
            return Progress([], runs, runs[0].rate)
        tried: dict[float, StudyRun] = {}
        todo: Sequence[float] = rates.first(setting.variant)
        while todo:
            tried |= {rate: self.run(setting, rate, seeds[0]) for rate in todo}
            scores = {rate: found for rate, run in tried.items() if (found := score(run.key)) is not None}
            if len(scores) < len(tried):
                return Progress(list(tried.values()), [], None)
            todo = next_rates(rates, scores)
        best = best_rate(scores)
        repeated = [] if best is None else [self.run(setting, best, seed) for seed in seeds]
        return Progress(list(tried.values()), repeated, best)

    def run(self, setting: Setting, rate: float | None, seed: int | None) -> StudyRun:
        """The run of a setting; None: the recipe's rate or seed. Raises RecipeError."""
        wanted = (setting.label, rate, seed)
        if wanted not in self._made:
            more = {RATE: rate, SEED: seed}
            own = [as_override(key, value) for key, value in more.items() if value is not None]
            overrides = [*self.study.overrides(setting.variant, setting.point), *own]
            recipe = load_recipe(self.study.recipe, overrides, given_by=self.study.sources(setting.variant))
            key = recipe_key(recipe, {key for key, _ in self.study.varied()})
            self._made[wanted] = StudyRun(setting, overrides, recipe, key)
        return self._made[wanted]

    def _check(self, run: StudyRun, first: StudyRun) -> None:
        """Refuse a run that is of no use in a table with the others. Raises UserError."""
        metric, scored = self.study.metric, run.recipe.eval
        bases = [each.recipe.model.name_or_path for each in (first, run)]
        tasks = [*scored.tasks, *scored.forgetting_tasks] if scored.after else []
        if bases[0] != bases[1]:
            what = f"runs of different bases do not go into one table: {bases[0]} and {bases[1]}"
            raise UserError(what, run.recipe.where("model.name_or_path"), "a study for each base")
        if metric == VALIDATION_LOSS and scored.validation is None:
            fix = "set: {eval.validation: rows.jsonl}, or metric: TASK/METRIC"
            raise UserError("a run has no validation loss", self.study.where("metric"), fix)
        if metric != VALIDATION_LOSS and metric.partition("/")[0] not in tasks:
            fix = f"{VALIDATION_LOSS}, or TASK/METRIC of a task of eval.tasks: {', '.join(tasks) or 'none'}"
            raise UserError(f"a run is not scored on {metric!r:.100}", self.study.where("metric"), fix)


def next_rates(rates: RatesConfig, scores: dict[float, float]) -> list[float]:
    """The rates to try after these; none where the best is not at the edge, or enough were tried.

    Args:
        scores: by rate, higher is better; -inf of a run that failed.
    """
    best, more = best_rate(scores), []
    if best == max(scores):
        more.append(best * rates.factor)
    if best == min(scores):
        more.append(best / rates.factor)
    return [float(f"{rate:.3g}") for rate in more][: max(0, rates.most - len(scores))]


def recipe_key(recipe: Recipe, varied: set[str]) -> str:
    """A hash of the values that say what a run learns, and of those that the study varies.

    Defaults are left out, so that a key that is new in a recipe does not make old runs other ones.
    """
    nested = recipe.model_dump(mode="json")
    values = {}
    for key, field in FIELDS.items():
        value = nested
        for part in key.split("."):
            value = value[part]
        if (key in varied or key not in SAFE_TO_CHANGE) and (field.is_required() or value != field.default):
            values[key] = value
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
