"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speft_ds.evaluation.scores import Change
from speft_ds.report.facts_sections import in_bytes
from speft_ds.report.run import Run, look_up, read_run
from speft_ds.report.score_sections import verdict


def summary(folder: Path) -> list[tuple[str, str]]:
    """(what, value) lines of a run, read from its files alone; what is not there is left out.

    Raises:
        UserError: the folder is no run folder.
    """
    run = read_run(folder)
    return [*score_lines(run), *_mask_lines(run), *_cost_lines(run)]


def score_lines(run: Run) -> list[tuple[str, str]]:
    """The main scores before and after, and what became of them."""
    before, after = run.evaluations.before, run.evaluations.after
    lines = []
    for main in (after or before).main_scores() if after or before else []:
        old, new = before and before.score(main.key), after and after.score(main.key)
        lines += [(f"{main.name} before", old.text)] if old else []
        change = Change(old, new) if old and new else None
        became = f"  ({change.short_text}: {verdict(change)})" if change else ""
        lines += [(f"{main.name} after", f"{new.text}{became}")] if new else []
    return lines + [("note", problem) for problem in run.evaluations.problems]


def _mask_lines(run: Run) -> list[tuple[str, str]]:
    trained, targets = run.fact("mask.num_trainable", int), run.fact("mask.num_target_elements", int)
    lines = []
    if trained is not None and targets:
        lines += [("trained entries", f"{trained:,} of {targets:,}"), ("density", f"{trained / targets:.4%}")]
    if head := run.fact("head", int):
        lines.append(("head, trained whole", f"{head:,} weights"))
    if changes := run.fact("mask.changes", list):
        last = look_up(changes[-1], "overlap_with_first", float)
        overlap = f"; overlap of the last mask with the first {last:.1%}" if last is not None else ""
        lines.append(("mask changes", f"{len(changes)}{overlap}"))
    return lines


def _cost_lines(run: Run) -> list[tuple[str, str]]:
    lines = []
    if run.adapter_bytes:
        lines.append(("adapter size", f"{run.adapter_bytes / 2**20:.2f} MiB"))
    total, training = run.fact("timings_s.total", float), run.fact("timings_s.training", float)
    if total is not None and training is not None:
        lines.append(("seconds", f"{total:.0f} ({training:.0f} of them training)"))
    if memory := run.account.get("memory"):
        largest = sorted(memory, key=memory.get, reverse=True)[:3]
        parts = ", ".join(f"{kind} {in_bytes(memory[kind])}" for kind in largest)
        lines.append(("memory of a rank", f"{in_bytes(sum(memory.values()))} ({parts}, ...)"))
    if sent := run.account.get("sent"):
        parts = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in sent.items())
        lines.append(("sent a step", parts))
    if tokens := run.tokens_per_s:
        lines.append(("tokens/s", f"{tokens:.0f} on {run.fact('world_size')} rank(s)"))
    return lines


def print_summary(folder: Path) -> None:
    """The table at the end of a run, and where everything lies."""
    table = Table(title=Text(str(folder)), show_header=False)
    for what, value in summary(folder):
        table.add_row(Text(what), Text(value))
    console = Console()
    console.print(table)
    for name, what in (
        ("report.html", "all of this and more, for a browser"),
        ("adapter/", "what was learnt; apply it with speft_ds.apply_adapter(model, path)"),
        ("eval/", "scores before and after"),
        ("metrics.jsonl", "one line a step"),
        ("run.json", "versions, mask, base, timings"),
        ("recipe.yaml", "the recipe with every default filled in"),
    ):
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True, markup=False)
