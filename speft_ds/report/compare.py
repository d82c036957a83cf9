"""Several runs side by side, those that differ only in their seed as one: what differs, and its effect."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import CLEAR, Score, in_text
from speft_ds.report.page import FROM_ZERO, head, smoothed
from speft_ds.report.plots import Curve, curves
from speft_ds.report.render import Picture, write_pages
from speft_ds.report.run import NUM_WARMUP, RunFolder, is_number, is_run, read_run
from speft_ds.report.tables import in_bytes, unique_tails
from speft_ds.terminal import duration

NOT_OF_A_GROUP = ("seed", "output_dir", "name")  # keys of the recipe
MACHINE = ("machine.device", "machine.cpu", "machine.gpu")
SCORED_ALIKE = {"num_fewshot", "limit", "chat_template", "lm_eval"}  # else scores are not comparable
MAX_NAME = 100
MAX_TASKS = 5  # that the verdict names
CURVES = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "peak_memory_gib": "GiB on rank 0",
}


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on one base, with several seeds or one."""

    label: str  # the name of its first run, and how many there are
    names: Sequence[str]  # of its runs: as much of their folders as tells them from the others
    runs: Sequence[RunFolder]
    recipe: dict[str, Any]  # by dotted key, without the keys in which its runs may differ

    def values(self, value: Callable[[RunFolder], float | None]) -> list[float]:
        """A number of each run that has it."""
        return [found for run in self.runs if is_number(found := value(run))]

    def mean_score(self, key: tuple[str, str, str], moment: str = "after") -> MeanScore | None:
        """The mean of a score `before` or `after`; None where no run has it."""
        by_seed: dict[Any, list[Score]] = {}
        for number, run in enumerate(self.runs):
            file = getattr(run.evaluations, moment)
            if file and (score := file.score(key)):
                by_seed.setdefault(_seed(run, number), []).append(score)
        return mean_score(list(by_seed.values()))

    @property
    def num_seeds(self) -> int:
        return len({_seed(run, number) for number, run in enumerate(self.runs)})


def _seed(run: RunFolder, number: int) -> Any:
    """The seed of a run or, where it is not known, one that no other run has; `number` tells them apart."""
    seed = run.setting("seed")
    return seed if is_number(seed) else f"run {number}"


@dataclass(frozen=True)
class MeanScore:
    """A score over the runs of a group."""

    value: float
    deviation: float | None  # the sample standard deviation over seeds; None of a single one
    stderr: float | None  # lm-eval's, over documents: the mean of the runs'; None where it is not known
    num_seeds: int
    is_share: bool

    @property
    def error(self) -> float | None:
        """For comparing: documents and seeds together, √(stderr² + deviation²/n); None: not known."""
        if self.stderr is None and self.deviation is None:
            return None
        return math.hypot(self.stderr or 0.0, (self.deviation or 0.0) / math.sqrt(self.num_seeds))

    def __str__(self) -> str:
        text = in_text(self.value, self.stderr, self.is_share)
        if self.deviation is None:
            return text
        deviation = f"{100 * self.deviation:.1f}" if self.is_share else f"{self.deviation:.2g}"
        return f"{text}, sd {deviation} (n={self.num_seeds})"


def mean_score(by_seed: Sequence[Sequence[Score]]) -> MeanScore | None:
    """The mean of one score over seeds; None where there is none.

    Args:
        by_seed: the scores of the runs of each seed: a run that was made twice counts once.
    """
    if not by_seed:
        return None
    values = [mean(score.value for score in scores) for scores in by_seed]
    scores = [score for each in by_seed for score in each]
    errors = [score.stderr for score in scores]
    return MeanScore(
        value=mean(values),
        deviation=stdev(values) if len(values) > 1 else None,
        stderr=mean(errors) if all(map(is_number, errors)) else None,
        num_seeds=len(values),
        is_share=all(score.is_share for score in scores),
    )


def without_duplicates(folders: Sequence[Path]) -> list[Path]:
    """Each folder once, in order."""
    first: dict[str, Path] = {}
    for folder in folders:
        first.setdefault(os.path.realpath(folder), folder)
    return list(first.values())


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write the report of several runs.

    Args:
        output: where it goes; None: runs/report-A-vs-B.
    Returns:
        The files: report.html and report.md.
    Raises:
        UserError: a folder is not a run folder, or the report cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    folder = output or Path("runs") / default_name(folders)
    if is_run(folder):
        fix = "name another folder: --output runs/report-mine"
        raise UserError(f"{folder} is a run: a report of several would hide its own", "--output", fix)
    return write_pages(folder, "comparison", **context_of(grouped(runs)))


def default_name(folders: Sequence[Path]) -> str:
    """`report-a-vs-b-vs-c`, or where that is long, `report-a-vs-2-others`."""
    names = [folder.absolute().name for folder in folders]
    full = f"report-{'-vs-'.join(names)}"
    return full if len(full) <= MAX_NAME else f"report-{names[0][:MAX_NAME]}-vs-{len(names) - 1}-others"


def grouped(runs: Sequence[RunFolder]) -> list[Group]:
    """Runs by recipe, but for the seed, and by base; in the order in which they were named."""
    names = ["/".join(tail) for tail in unique_tails([run.folder.absolute().parts for run in runs])]
    members: dict[str, list[tuple[str, RunFolder]]] = {}
    for name, run in zip(names, runs, strict=True):
        recipe = sorted(_flat(run.recipe)) or name
        members.setdefault(repr((recipe, run.fact("base.fingerprint"))), []).append((name, run))
    groups = []
    for named in members.values():
        own = [run for _, run in named]
        group = Group(named[0][0], [name for name, _ in named], own, dict(_flat(own[0].recipe)))
        groups.append(replace(group, label=group.label + _how_many(len(own), group.num_seeds)))
    return groups


def _how_many(runs: int, seeds: int) -> str:
    if runs == 1:
        return ""
    return f" ({seeds} seeds)" if seeds == runs else f" ({runs} runs of {seeds} seed{'s' * (seeds > 1)})"


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested recipe, without the keys in which runs of one group may differ."""
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif key not in NOT_OF_A_GROUP:
            yield key, value


def context_of(groups: Sequence[Group]) -> dict[str, Any]:
    """What the templates show."""
    runs = [run for group in groups for run in group.runs]
    scored = [file for run in runs if (file := run.evaluations.after)]
    # Of all main scores after training, groups of tasks first.
    tasks = {score.key: score for file in reversed(scored) for score in file.main_scores()}
    losses = [(mean(values), group.label) for group in groups if (values := group.values(_lowest_validation))]
    heads = [dict(head(run)) for run in runs]
    common = [pair for pair in heads[0].items() if all(pair in each.items() for each in heads)]
    known = dict.fromkeys(what for each in heads for what in each if what != "command line")
    origin = [what for what in known if what not in dict(common)]
    keys = dict.fromkeys(key for group in groups for key in group.recipe)
    settings = [(key, *(_setting(group, key) for group in groups)) for key in keys]
    of = " of one recipe" if len(groups) == 1 else f" of {len(groups)} recipes"
    of = of if len(groups) < len(runs) else ""
    return {
        "title": f"{len(runs)} runs{of} compared",
        "best": [(score.name, *_ranked(groups, score)) for score in list(tasks.values())[:MAX_TASKS]],
        "clear": CLEAR,
        "lowest_validation_loss": min(losses) if len(losses) > 1 else None,
        "notes": _notes(runs) + _unlike(runs),
        "figures": [],
        "pictures": _curves(groups),
        "labels": [group.label for group in groups],
        "scores": [(score.name, *(_from_to(g, key) for g in groups)) for key, score in tasks.items()],
        "scored": scored,
        "has_seeds": any(group.num_seeds > 1 for group in groups),
        "differing": [(key, *values) for key, *values in settings if len(set(values)) > 1],
        "costs": [
            (what, *(_mean_text(group.values(of), text) for group in groups)) for what, of, text in COSTS
        ],
        "head": common,
        "origin": origin,
        "runs": [
            (name, run.folder, str(run.setting("seed")), run.num_ranks or None, *map(each.get, origin))
            for (name, run), each in zip(_named(groups), heads, strict=True)
        ],
        "num_warmup": NUM_WARMUP,
    }


def _named(groups: Sequence[Group]) -> list[tuple[str, RunFolder]]:
    """The runs of all groups, by name."""
    return [pair for group in groups for pair in zip(group.names, group.runs, strict=True)]


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    """What is to be known of the runs, once for all that it is true of."""
    folders: dict[str, list[str]] = {}
    for run in runs:
        not_finished = [] if run.is_finished else ["the run is not finished"]
        for note in (*run.problems, *run.evaluations.notes, *not_finished):
            folders.setdefault(note, []).append(str(run.folder))
    return [f"{', '.join(where)}: {note}" for note, where in folders.items()]


def _setting(group: Group, key: str) -> str:
    value = group.recipe.get(key, "-")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _from_to(group: Group, key: tuple[str, str, str]) -> str | None:
    before, after = group.mean_score(key, "before"), group.mean_score(key)
    first = f"{in_text(before.value, None, before.is_share)} → " if before else ""
    return f"{first}{after}" if after else None


def _ranked(groups: Sequence[Group], score: Score) -> tuple[list[tuple[str, MeanScore]], float | None]:
    """Labels and scores, the best first; how many standard errors the first two are apart, where known."""
    means = [(group.label, found) for group in groups if (found := group.mean_score(score.key))]
    means.sort(key=lambda pair: -score.sign * pair[1].value)
    first_two = [found for _, found in means[:2]]
    errors = [found.error for found in first_two]
    if len(first_two) < 2 or None in errors or not (error := math.hypot(*errors)):
        return means, None
    return means, abs(first_two[0].value - first_two[1].value) / error


def _unlike(runs: Sequence[RunFolder]) -> list[str]:
    """Why numbers of these runs may not be comparable."""
    scored = [run.evaluations.after for run in runs if run.evaluations.after]
    settings = {file.settings.model_dump_json(include=SCORED_ALIKE) for file in scored}
    bases = {run.fact("base.fingerprint", "") for run in runs} - {""}
    machines = {repr([run.num_ranks, *map(run.fact, MACHINE)]) for run in runs}
    reasons = {
        "the runs were scored in different ways: their scores are not comparable as they are": settings,
        "the runs have different bases (their fingerprints differ)": bases,
        "the runs were made on different machines or numbers of ranks: compare no times": machines,
    }
    return [reason for reason, found in reasons.items() if len(found) > 1]


def _mean_text(values: Sequence[float], text: Callable[[float], str]) -> str | None:
    """The mean, and lowest to highest where they differ."""
    if not values:
        return None
    low, high = text(min(values)), text(max(values))
    return text(mean(values)) + (f" ({low} to {high})" if low != high else "")


def _last_loss(run: RunFolder) -> float | None:
    losses = smoothed(run.series("loss")[1])
    return losses[-1] if losses else None


def _lowest_validation(run: RunFolder) -> float | None:
    return min(run.series("validation_loss")[1], default=None)


def _peak_memory(run: RunFolder) -> float | None:
    return max(run.series("peak_memory_gib")[1], default=None)


# (what, of a run, as text)
COSTS: list[tuple[str, Callable[[RunFolder], float | None], Callable[[float], str]]] = [
    ("training loss", _last_loss, "{:.4g}".format),
    ("lowest validation loss", _lowest_validation, "{:.4g}".format),
    ("steps", lambda run: run.num_done, "{:,.0f}".format),
    ("time in steps", lambda run: run.step_seconds, duration),
    ("tokens/s", lambda run: run.tokens_per_s, "{:,.0f}".format),
    ("peak memory", _peak_memory, "{:.2f} GiB".format),
    ("trained entries", lambda run: run.fact("mask.num_trainable"), "{:,.0f}".format),
    ("adapter", lambda run: run.adapter_bytes, in_bytes),
]


def _curves(groups: Sequence[Group]) -> dict[str, Picture]:
    """One picture per quantity, a colour per group, dashes and a name per run."""
    pictures = {}
    for key, what in CURVES.items():
        lines = []
        for colour, group in enumerate(groups):
            for dash, (name, run) in enumerate(zip(group.names, group.runs, strict=True)):
                steps, values = run.series(key)
                values = smoothed(values) if key == "loss" else values
                lines += [Curve(name, steps, values, colour, dash)] if values else []
        if lines:
            alt = f"{what} over steps: {', '.join(line.label for line in lines)}"
            drawn = curves(lines, what, from_zero=key in FROM_ZERO)
            pictures[f"{key}.svg"] = Picture(drawn, alt, is_small=True)
    return pictures
