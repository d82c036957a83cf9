"""The key figures of a run, as its report and the end of its log have them."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from speft_ds.evaluation.scores import ScoreChange
from speft_ds.report.run import RunFolder, look_up, numbers, read_run
from speft_ds.report.tables import in_bytes, plain
from speft_ds.terminal import Console, duration

STAGES = {
    "start": "starting the ranks",
    "tasks": "checking the tasks",
    "data": "reading and tokenizing rows",
    "kernels": "measuring the kernels",
    "model": "loading the model",
    "eval_before": "scoring before training",
    "salience": "scoring the weights",
    "selection": "selecting the mask",
    "state": "setting up the entries",
    "resume": "loading the checkpoint",
    "training": "training",
    "validation": "training: validation loss",
    "slices": "training: scoring slices",
    "checkpoints": "training: checkpoints",
    "save": "writing the adapter",
    "eval_after": "scoring after training",
    "other": "all else",
}
MIN_SHARE = 0.02  # of the total, for a stage that the table at the end names
# Kinds of memory, of what is trained.
STATE = ("mask", "index", "base values", "delta", "gradient", "optimizer")
WITHIN = ("validation", "slices", "checkpoints")
FILES = {
    "report.html": "all of this, memory by kind, traffic and curves, for a browser",
    "adapter/": "the trained entries; apply them with speft_ds.apply_adapter(model, path)",
    "eval/": "scores before and after",
    "metrics.jsonl": "one line per step",
    "run.json": "versions, mask, base, timings",
    "recipe.yaml": "the recipe with every default filled in",
}


def print_summary(folder: Path) -> None:
    """Print the key figures of a run, and where everything lies.

    Raises:
        UserError: the folder is not a run folder.
    """
    run = read_run(folder)
    table = Table(title=plain(str(folder)), show_header=False)
    for row in key_figures(run):
        table.add_row(*map(plain, row))
    console = Console()
    console.print(table)
    for note in (*run.evaluations.problems, *run.evaluations.notes):
        console.print(plain(f"  note: {note}"), soft_wrap=True)
    for name, what in FILES.items():
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True)


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
    """Of adapter, mask and whole weights; time by stage; memory."""
    trained, targets = run.fact("mask.num_trainable", 0), run.fact("mask.num_target_elements", 0)
    rows = []
    if (method := run.fact("method", "sparse")) != "sparse":
        rows.append(("method", method, ""))
    if run.adapter_bytes:
        entries = numbers(run.adapter).get("num_entries") or trained
        has_others = run.fact("low_rank.num_elements", 0)
        each = "" if has_others else f", {run.adapter_bytes / max(1, entries):.2f} bytes each"
        each = f"{entries:,} entries{each}" if entries else ""
        rows.append(("adapter", in_bytes(run.adapter_bytes), each))
    if trained and targets:
        rows.append(("trained entries", f"{trained:,}", f"of {targets:,} ({trained / targets:.4%})"))
    if run.fact("data.rows_read", 0):
        rows.append(_rows_trained(run))
    if whole := run.fact("whole", 0):
        rows.append(("trained whole", f"{whole:,}", "weights"))
    if low_rank := run.fact("low_rank.num_elements", 0):
        rows.append(("low-rank matrices", f"{low_rank:,}", f"elements, rank {run.fact('low_rank.rank', 0)}"))
    if changes := run.fact("mask.changes", []):
        overlap = look_up(changes[-1], "overlap_with_first", 0.0)
        rows.append(
            ("mask changes", f"{len(changes)}", f"overlap of the last mask with the first {overlap:.1%}")
        )
    if total := run.fact("timings_s.total", 0):
        rows.append(("total time", duration(total), "of the last start"))
        stages = seconds_by_stage(run, MIN_SHARE).items()
        rows += [(f"- {name}", duration(seconds), f"{seconds / total:.0%}") for name, seconds in stages]
    peak, memory, sent = run.resources
    if state := sum(memory.get(kind, 0) for kind in STATE):
        rows.append(("trainable state per rank", in_bytes(state), "values, gradients, optimizer, indices"))
    if sent:
        rows.append(("gradients sent per rank and step", in_bytes(sum(sent.values())), "weights not counted"))
    if peak:
        rows.append(("peak memory per rank", in_bytes(peak), "by kind in the report"))
    return rows


def _rows_trained(run: RunFolder) -> tuple[str, str, str]:
    left_out = [f"{number:,} {why}" for why, number in numbers(run.fact("data.left_out", {})).items()]
    how = f"of {run.fact('data.rows_read', 0):,} read; left out: {', '.join(left_out) or 'none'}"
    size = f"{run.fact('data.label_tokens', 0):,} label tokens, {run.fact('data.epochs', 0.0):.3g} epochs"
    return "training rows", f"{run.fact('data.rows', 0):,}", f"{how}; {size}"


def seconds_by_stage(run: RunFolder, min_share: float) -> dict[str, float]:
    """Seconds of the last start, the longest stage first, without those below a share of the total."""
    timings = numbers(run.fact("timings_s"))
    if total := timings.pop("total", 0.0):
        known = sum(seconds for stage, seconds in timings.items() if stage not in WITHIN)
        timings["other"] = max(total - known, 0.0)
    shown = {STAGES.get(stage, stage): s for stage, s in timings.items() if s >= min_share * total}
    within = {STAGES[stage] for stage in WITHIN}
    training = shown.get("training", 0.0)  # which its parts follow

    def order(pair: tuple[str, float]) -> tuple[float, bool, float]:
        name, seconds = pair
        return -(training if name in within else seconds), name in within, -seconds

    return dict(sorted(shown.items(), key=order))
