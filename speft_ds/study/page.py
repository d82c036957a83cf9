"""The table and the page of a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import in_text
from speft_ds.report import tables
from speft_ds.report.plots import Curve, curves
from speft_ds.report.render import Picture, write_pages
from speft_ds.report.tables import in_bytes, plain
from speft_ds.study.execute import Execution
from speft_ds.study.results import Measure, Result
from speft_ds.study.runs import Progress, Setting
from speft_ds.study.statistics import CONFIDENCE, Estimate, estimate, paired_difference, plateau
from speft_ds.study.study_config import RATE
from speft_ds.terminal import duration

Headed = tuple[list[str], list[tuple[Any, ...]]]  # a table: headings and rows, a dash for None
ROLES = ("held-out", "task", "forgetting")
# What a run costs -> (attribute of its result, as text)
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trained elements": ("num_trained", "{:,.0f}".format),
    "time in steps": ("seconds", duration),
    "peak memory per rank": ("peak_bytes", in_bytes),
    "adapter": ("adapter_bytes", in_bytes),
}


@dataclass(frozen=True)
class Row:
    """A setting with its finished runs.

    Attributes:
        by_seed: seed -> result, at the best rate or the recipe's; tried: rate -> result, of the first
            seed; those that failed, too.
    """

    setting: Setting
    progress: Progress
    by_seed: dict[int, Result]
    tried: dict[float, Result]

    def values(self, measure: str) -> dict[int, float]:
        """Of each seed that has it."""
        return {s: r.measures[measure].value for s, r in self.by_seed.items() if measure in r.measures}

    def estimate(self, measure: str) -> Estimate | None:
        return estimate(list(self.values(measure).values()))

    def mean_of(self, attribute: str) -> float | None:
        """Over the results that have it."""
        known = [value for r in self.by_seed.values() if (value := getattr(r, attribute)) is not None]
        return mean(known) if known else None

    @property
    def is_at_edge(self) -> bool:
        return bool(self.tried) and self.progress.best_rate in (min(self.tried), max(self.tried))


class Summary:
    """What the runs of a study come to.

    Raises:
        UserError: its runs are of different bases.
    """

    def __init__(self, execution: Execution):
        self.grid, self.results = execution.grid, execution.results
        self.study, self.metric = self.grid.study, self.grid.study.metric
        self.num_seeds = max(1, len(self.study.seeds))
        finished = {key: result for key, result in self.results.items() if result.state == "finished"}
        self.rows = []
        for setting in self.grid.settings:
            progress = self.grid.progress(setting, execution.score)
            by_seed = {r.seed: r for run in progress.seeds if (r := finished.get(run.key))}
            tried = {run.rate: self.results[run.key] for run in progress.swept if run.key in self.results}
            self.rows.append(Row(setting, progress, by_seed, tried))
        self.planned = {run.key: run for row in self.rows for run in row.progress.runs}
        self.used = [result for key, result in finished.items() if key in self.planned]
        self.num_others = len(finished) - len(self.used)
        bases = {result.base: result.name for result in self.used if result.base is not None}
        if len(bases) > 1:
            what = f"the runs are of different bases: {' and '.join(bases.values())}"
            fix = "remove the folders of the runs of one, or make a study for each"
            raise UserError(what, str(execution.folder), fix)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """One of each, the metric first."""
        found = {name: each for result in self.used for name, each in result.measures.items()}
        order = sorted(found.items(), key=lambda item: (item[0] != self.metric, ROLES.index(item[1].role)))
        return dict(order)

    def text(self, found: Estimate | None, measure: str, signed: bool = False) -> str | None:
        return found and in_text(found.mean, found.error, self.measures[measure].is_share, signed)

    def difference(self, row: Row) -> Estimate | None:
        """Of the metric to the reference, over the seeds that both have; None of the reference itself."""
        other = self.grid.counterpart(row.setting)
        if other is None or other.label == row.setting.label:
            return None
        (reference,) = (each for each in self.rows if each.setting.label == other.label)
        return paired_difference(row.values(self.metric), reference.values(self.metric))

    @property
    def ranked(self) -> list[tuple[str, str]]:
        """Labels and values of the settings that have the metric, the best first."""
        known = [(found, row) for row in self.rows if (found := row.estimate(self.metric))]
        sign = -1 if known and self.measures[self.metric].higher_is_better else 1
        known.sort(key=lambda pair: sign * pair[0].mean)
        return [(row.setting.label, self.text(found, self.metric)) for found, row in known]

    def main_table(self) -> Headed:
        """The metric, the difference to the reference, the rate."""
        reference, rates = self.study.reference, self.study.rates
        headings, rows = ["setting", self.metric, "seeds"], []
        headings += [f"to {reference}", "clear"] if reference else []
        headings += ["best rate", "plateau"] if rates else []
        for row in self.rows:
            value, seeds = row.estimate(self.metric), f"{len(row.by_seed)} of {self.num_seeds}"
            cells = [row.setting.label, self.text(value, self.metric), seeds]
            if reference:
                found = self.difference(row)
                cells.append(self.text(found, self.metric, signed=True))
                is_known = found is not None and found.error is not None
                cells.append(("yes" if found.is_clear else "no") if is_known else None)
            if rates:
                scores = {rate: result.score(self.metric) for rate, result in row.tried.items()}
                reach, best = plateau(scores, rates.tolerance), row.progress.best_rate
                cells += [best and f"{best:.3g}", reach and str(reach)]
            rows.append(tuple(cells))
        return headings, rows

    def measure_table(self) -> Headed:
        """Every measure, and how far the mean is from the untouched model's."""

        def cell(row: Row, name: str, measure: Measure) -> str | None:
            text = self.text(row.estimate(name), name)
            own = [result.measures[name] for result in row.by_seed.values() if name in result.measures]
            changes = [each.value - each.before for each in own if each.before is not None]
            if not changes:
                return text
            return f"{text} ({in_text(mean(changes), None, measure.is_share, signed=True)})"

        known = self.measures.items()
        names = [f"{name}{' (forgetting)' * (each.role == 'forgetting')}" for name, each in known]
        rows = [(row.setting.label, *(cell(row, *measure) for measure in known)) for row in self.rows]
        return ["setting", *names], rows

    def cost_table(self) -> Headed:
        means = [[(row.mean_of(name), text) for name, text in COSTS.values()] for row in self.rows]
        cells = [[value and text(value) for value, text in each] for each in means]
        rows = [(row.setting.label, *own) for row, own in zip(self.rows, cells, strict=True)]
        return ["setting", *COSTS], rows

    def left_out(self) -> list[tuple[str, str, str | None]]:
        """The runs that the tables lack: name, state, and the end of its log."""
        ended = [(run, self.results.get(key)) for key, run in self.planned.items()]
        return [
            (run.name, result.state if result else "not finished", result and result.cause)
            for run, result in ended
            if result is None or result.state == "failed"
        ]

    def notes(self) -> list[str]:
        """What is to be known of the numbers."""
        left, rows = len(self.left_out()), self.rows
        of_settings = {
            "no best rate yet": [row for row in rows if row.progress.best_rate is None],
            "the best rate is at the edge of those tried": [row for row in rows if row.is_at_edge],
            "fewer seeds than asked for": [row for row in rows if len(row.by_seed) < self.num_seeds],
        }
        notes = [
            f"{what}: {'; '.join(r.setting.label for r in some)}"
            for what, some in of_settings.items()
            if some
        ]
        if self.used and self.metric not in self.measures:
            notes.append(f"no run has {self.metric}; they have {', '.join(self.measures) or 'no measure'}")
        machines, others = {result.machine for result in self.used}, self.num_others
        if left:
            notes.append(f"{left} run(s) are left out: they failed, or are not finished")
        if self.num_seeds == 1:
            notes.append("one seed: nothing is known of the spread")
        if len(machines) > 1:
            notes.append("the runs were made on different machines or numbers of ranks: compare no times")
        if others:
            notes.append(f"{others} finished run(s) of the folder are not of this study any more")
        return notes

    def pictures(self) -> dict[str, Picture]:
        """The metric over the rate, and over the number of trained elements."""
        by_rate: dict[str, list[tuple[float, float]]] = {}
        by_size: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            found, size = row.estimate(self.metric), row.mean_of("num_trained")
            point = {key: value for key, value in row.setting.point.items() if key != RATE}
            points = by_rate.setdefault(Setting(row.setting.variant, point).label, [])
            swept = [
                (rate, r.measures[self.metric]) for rate, r in row.tried.items() if self.metric in r.measures
            ]
            points += [(rate, measure.value) for rate, measure in swept]
            if found and not row.tried:
                points.append((row.progress.best_rate, found.mean))
            if found and size:
                by_size.setdefault(row.setting.variant, []).append((size, found.mean))
        drawn = {"rates.svg": ("learning rate", by_rate), "trained.svg": ("trained elements", by_size)}
        return {
            name: self._picture(over, lines)
            for name, (over, lines) in drawn.items()
            if len({x for points in lines.values() for x, _ in points}) > 1
        }

    def _picture(self, over: str, lines: dict[str, list[tuple[float, float]]]) -> Picture:
        known = [(label, *zip(*sorted(points), strict=True)) for label, points in lines.items() if points]
        drawn = [Curve(*line, colour) for colour, line in enumerate(known)]
        alt = f"{self.metric} over {over}: {', '.join(line.label for line in drawn)}"
        return Picture(curves(drawn, self.metric, over=over), alt, is_small=True)


def publish(execution: Execution) -> None:
    """Write report.html and report.md into the study's folder; print the table, and where they are.

    Raises:
        UserError: the runs are of different bases, or the page cannot be written.
    """
    summary, study = Summary(execution), execution.grid.study
    head = {"recipe": study.recipe, "compared by": summary.metric, "reference": study.reference}
    head |= {"seeds": ", ".join(map(str, study.seeds)), "finished": f"{len(summary.used)} runs"}
    shown = {"title": f"Study {study.name}", "head": [pair for pair in head.items() if pair[1]]}
    shown |= {"notes": summary.notes(), "figures": [], "pictures": summary.pictures(), "summary": summary}
    paths = write_pages(execution.folder, "study", **shown, confidence=f"{CONFIDENCE:.0%}")
    headings, rows = summary.main_table()
    table = Table(title=plain(shown["title"]), box=SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(plain(heading), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(plain("-" if cell is None else cell) for cell in row))
    tables.print_table(table)
    print("\n".join([*(f"note: {note}" for note in shown["notes"]), *map(str, paths)]))
