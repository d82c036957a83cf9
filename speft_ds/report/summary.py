"""The numbers that matter most of a run, and the table of them at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from speft_ds.evaluation.scores import ScoreChange
from speft_ds.report.run import RunFolder, look_up, numbers, read_run
from speft_ds.report.tables import duration, in_bytes, plain

FILES = {
    "report.html": "all of this and more, for a browser",
    "adapter/": "the trained entries; apply them with speft_ds.apply_adapter(model, path)",
    "eval/": "scores before and after",
    "metrics.jsonl": "one line per step",
    "run.json": "versions, mask, base, timings",
    "recipe.yaml": "the recipe with every default filled in",
}


def print_summary(folder: Path) -> None:
    """Print the table at the end of a run, and where everything lies.

    Raises:
        UserError: the folder is not a run folder.
    """
    run = read_run(folder)
    table = Table(title=plain(str(folder)), show_header=False)
    for row in [*key_figures(run), *(("note", problem, "") for problem in run.evaluations.problems)]:
        table.add_row(*map(plain, row))
    console = Console()
    console.print(table)
    for name, what in FILES.items():
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True, markup=False)


def key_figures(run: RunFolder, max_scores: int | None = None) -> list[tuple[str, str, str]]:
    """(what, number, how it came about), the most important first; what is not known is left out."""
    rows = []
    for score in run.evaluations.main_scores()[:max_scores]:
        old, new = run.evaluations.both(score)
        if old and new:
            change = ScoreChange(old, new)
            how = f"before {old.short}: {change}, {change.verdict_text}"
            rows.append((score.name, new.short, how))
        else:
            rows.append((score.name, str(score), "after training" if new else "before training"))
    for key, what in (("validation_loss", "validation loss"), ("loss", "training loss")):
        steps, values = run.series(key)
        if values:
            rows.append((what, f"{values[-1]:.4g}", f"at step {steps[-1]:,}; at first {values[0]:.4g}"))
    if run.step_seconds:
        speed = f"{run.tokens_per_s:,.0f} tokens/s" if run.tokens_per_s else "in steps"
        ranks = f", {run.num_ranks} rank(s)" if run.num_ranks else ""
        rows.append(("training time", duration(run.step_seconds), speed + ranks))
    return [*rows, *_sizes(run)]


def _sizes(run: RunFolder) -> list[tuple[str, str, str]]:
    trained, targets = run.fact("mask.num_trainable", 0), run.fact("mask.num_target_elements", 0)
    rows = []
    if run.adapter_bytes:
        entries = numbers(run.adapter).get("num_entries") or trained
        each = f"{entries:,} entries, {run.adapter_bytes / entries:.2f} bytes each" if entries else ""
        rows.append(("adapter", in_bytes(run.adapter_bytes), each))
    if trained and targets:
        rows.append(("trained entries", f"{trained:,}", f"of {targets:,} ({trained / targets:.4%})"))
    if head := run.fact("head", 0):
        rows.append(("fully trained head", f"{head:,}", "weights"))
    if changes := run.fact("mask.changes", []):
        last = look_up(changes[-1], "overlap_with_first", 0.0)
        rows.append(
            ("mask changes", f"{len(changes)}", f"overlap of the last mask with the first {last:.1%}")
        )
    if total := numbers(run.fact("timings_s", {})).get("total"):
        rows.append(("total time", duration(total), "of the last start"))
    peak, memory, sent = run.resources
    for what, total, kinds in (
        ("peak memory per rank", peak, memory),
        ("sent per rank per step", sum(sent.values()), sent),
    ):
        largest = sorted(kinds, key=kinds.get, reverse=True)[:3]
        named = ", ".join(f"{kind} {in_bytes(kinds[kind])}" for kind in largest)
        rows += [(what, in_bytes(total), named)] if kinds else []
    return rows
