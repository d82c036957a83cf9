"""Several runs side by side: what differs in their recipes, and what that did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import CLEAR, Score, in_text
from speft_ds.report.build import write_document
from speft_ds.report.document import Block, Document, Notes, Picture, Section, Table, Text
from speft_ds.report.facts_sections import in_bytes
from speft_ds.report.pictures import Line, curves, running_mean
from speft_ds.report.run import NUM_WARMUP, Run, is_run, read_run
from speft_ds.report.score_sections import NONE, how_scored
from speft_ds.report.seeds import Group, Mean, differing_keys, grouped, mean_of, without_doubles
from speft_ds.report.training_sections import mean_size
from speft_ds.report.verdict import duration

LONGEST_NAME = 100
MOST_TASKS = 5  # that the verdict speaks of
CURVES = {
    "validation_loss": "validation loss (nats a label token)",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "peak_memory_gib": "GiB on rank 0",
}


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write the report of several runs.

    Args:
        output: where it goes; None: runs/report-A-vs-B.
    Returns:
        The files: report.html and report.md.
    Raises:
        UserError: a folder is no run folder, or the report cannot be written.
    """
    folders = without_doubles(folders)
    runs = [read_run(folder) for folder in folders]
    folder = output or Path("runs") / default_name(folders)
    if is_run(folder):
        fix = "name another folder: --output runs/report-mine"
        raise UserError(f"{folder} is a run: a report of several would hide its own", "--output", fix)
    return write_document(comparison_of(runs), folder)


def default_name(folders: Sequence[Path]) -> str:
    names = [folder.absolute().name for folder in folders]
    full = f"report-{'-vs-'.join(names)}"
    short = f"report-{names[0][:LONGEST_NAME]}-vs-{len(names) - 1}-others"
    return full if len(full) <= LONGEST_NAME else short


def comparison_of(runs: Sequence[Run]) -> Document:
    groups = grouped(runs)
    blocks: list[Block] = [Text(verdict_of(groups))]
    notes = [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.folder}: the run is not finished" for run in runs if not run.is_finished]
    notes += _unlike(runs)
    blocks += [Notes(notes)] * bool(notes)
    in_groups = f" in {len(groups)} groups" if len(groups) < len(runs) else ""
    title = f"{len(runs)} runs{in_groups} compared"
    sections = [scores_section(groups), recipe_section(groups), cost_section(groups), curves_section(groups)]
    return Document(title, blocks, [*sections, runs_section(groups)])


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Why numbers of these runs may not be comparable."""
    notes = []
    settings = set()
    for evaluation in [run.evaluations.after for run in runs if run.evaluations.after]:
        found = evaluation.settings
        settings.add((found.num_fewshot, found.limit, found.chat_template, found.lm_eval))
    if len(settings) > 1:
        notes.append("the runs were scored in different ways: their scores are not comparable as they are")
    if len({run.fact("base.fingerprint", str) for run in runs} - {None}) > 1:
        notes.append("the runs have different bases (their fingerprints differ)")
    keys = ("machine.device", "machine.cpu", "machine.gpu", "world_size")
    if len({repr([run.fact(key) for key in keys]) for run in runs}) > 1:
        notes.append("the runs were made on different machines or numbers of ranks: compare no times")
    return notes


def main_keys(groups: Sequence[Group]) -> dict[tuple[str, str, str], Score]:
    """Key -> a score with it, of all main scores after training; groups of tasks first."""
    found = [run.evaluations.after for group in groups for run in group.runs if run.evaluations.after]
    return {score.key: score for evaluation in reversed(found) for score in evaluation.main_scores()}


def verdict_of(groups: Sequence[Group]) -> str:
    """Which is best on what, and whether that is clear."""
    sentences = [_best(groups, score) for score in list(main_keys(groups).values())[:MOST_TASKS]]
    validation = [(mean(values), group) for group in groups if (values := group.values(_best_held_out))]
    if len(validation) > 1:
        lowest, group = min(validation, key=lambda pair: pair[0])
        sentences.append(f"The lowest validation loss has {group.label} ({lowest:.4g}).")
    return " ".join(sentences) or "No run was scored after training, so there is no best one."


def _best(groups: Sequence[Group], score: Score) -> str:
    means = [(found, g.label) for g in groups if (found := mean_of(g.scores(score.key))) is not None]
    sign = 1 if score.higher_is_better else -1
    means.sort(key=lambda pair: -sign * pair[0].value)
    (best, label), *others = means
    if not others:
        return f"On {score.name}, {label} reaches {best.text}; no other was scored on it."
    second, other = others[0]
    errors = _num_errors(best, second)
    apart = "no standard error is known" if errors is None else f"{errors:.1f} standard errors apart"
    if errors is not None and errors < CLEAR:
        apart += ", so that is no clear order"
    return f"On {score.name}, {label} is first with {best.text}, then {other} with {second.text}: {apart}."


def _num_errors(a: Mean, b: Mean) -> float | None:
    if a.error is None or b.error is None or not (error := math.hypot(a.error, b.error)):
        return None
    return abs(a.value - b.value) / error


def scores_section(groups: Sequence[Group]) -> Section:
    """Before and after of every group, a row each."""
    keys = main_keys(groups)
    if not keys:
        return Section("Scores", [Text("No run was scored after training.")])
    rows = [(group.label, *(_from_to(group, key) for key in keys)) for group in groups]
    evaluations = [run.evaluations.after for group in groups for run in group.runs if run.evaluations.after]
    how = how_scored(evaluations[:1])
    if any(len(group.runs) > 1 for group in groups):
        how += (
            " Where n runs differ in their seed alone, this is their mean; sd is the standard deviation over "
            "them, beside lm-eval's error over documents. To compare, both count: √(stderr² + sd²/n)."
        )
    headings = ["run", *(f"{score.name}, before → after" for score in keys.values())]
    return Section("Scores", [Table(headings, rows), Text(how, is_small=True)])


def _from_to(group: Group, key: tuple[str, str, str]) -> str:
    before, after = (mean_of(group.scores(key, moment)) for moment in ("before", "after"))
    first = f"{in_text(before.value, None, before.is_share)} → " if before else ""
    return f"{first}{after.text}" if after else NONE


def recipe_section(groups: Sequence[Group]) -> Section:
    keys = differing_keys(groups)
    if not keys:
        return Section("What differs", [Text("Nothing in the recipes but seed and output_dir.")])
    rows = [(group.label, *(_value(group.recipe.get(key, NONE)) for key in keys)) for group in groups]
    return Section("What differs", [Table(["run", *keys], rows)])


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def cost_section(groups: Sequence[Group]) -> Section:
    """Loss, time, memory and size."""
    columns: dict[str, tuple[Callable[[Run], float | None], Callable[[float], str]]] = {
        "training loss": (_last_loss, lambda value: f"{value:.4g}"),
        "lowest validation loss": (_best_held_out, lambda value: f"{value:.4g}"),
        "steps": (lambda run: run.num_done, lambda value: f"{value:,.0f}"),
        "time in steps": (lambda run: run.step_seconds, duration),
        "tokens/s": (lambda run: run.tokens_per_s, lambda value: f"{value:,.0f}"),
        "peak memory": (lambda run: run.peak_memory_gib, lambda value: f"{value:.2f} GiB"),
        "trained entries": (lambda run: run.fact("mask.num_trainable", int), lambda value: f"{value:,.0f}"),
        "adapter": (lambda run: run.adapter_bytes, in_bytes),
    }
    rows = []
    for group in groups:
        values = [(group.values(value), text) for value, text in columns.values()]
        rows.append((group.label, *(_mean_text(found, text) for found, text in values)))
    how = (
        "How: the training loss is the mean of the last 4% of the steps; tokens/s leave out the first "
        f"{NUM_WARMUP} steps; memory is of rank 0. Of several seeds: the mean, and lowest to highest."
    )
    return Section("Loss, time, memory, size", [Table(["run", *columns], rows), Text(how, is_small=True)])


def _mean_text(values: Sequence[float], text: Callable[[float], str]) -> str:
    if not values:
        return NONE
    middle = text(mean(values))
    low, high = text(min(values)), text(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def _last_loss(run: Run) -> float | None:
    losses = run.series("loss")[1]
    return running_mean(losses, mean_size(len(losses)))[-1] if losses else None


def _best_held_out(run: Run) -> float | None:
    return min(run.series("validation_loss")[1], default=None)


def curves_section(groups: Sequence[Group]) -> Section:
    """One picture a quantity, a colour a group, a line a run."""
    pictures: list[Block] = []
    for key, what in {"loss": "loss, mean of the last 4% of the steps", **CURVES}.items():
        lines = []
        for colour, group in enumerate(groups):
            for number, run in enumerate(group.runs):
                steps, values = run.series(key)
                if values:
                    drawn = running_mean(values, mean_size(len(values))) if key == "loss" else values
                    lines.append(Line("" if number else group.label, steps, drawn, colour))
        if lines:
            labels = ", ".join(line.label for line in lines if line.label)
            pictures.append(Picture(f"{key}.svg", curves(lines, what), f"{what} over steps: {labels}"))
    return Section("Training", pictures or [Text("No run has made a step.")])


def runs_section(groups: Sequence[Group]) -> Section:
    """What stands for each label."""
    rows = [
        (group.label, str(run.folder), str(run.setting("seed")), str(run.fact("world_size")))
        for group in groups
        for run in group.runs
    ]
    return Section("The runs", [Table(("label", "folder", "seed", "ranks"), rows)])
