"""What a run came to: a pure function of its folder."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def summary(folder: Path) -> list[tuple[str, str]]:
    """(what, value) lines of a finished run, read from its files alone."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = [*score_lines(folder)]
    mask, timings = facts["mask"], facts["timings_s"]
    size = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    lines += [
        ("trained entries", f"{mask['num_trainable']:,} of {mask['num_target_elements']:,}"),
        ("density", f"{mask['density']:.4%}"),
        *[("head, trained whole", f"{facts['head']:,} weights") for _ in range(bool(facts["head"]))],
        *change_lines(mask["changes"]),
        ("adapter size", f"{size / 2**20:.2f} MiB"),
        ("seconds", f"{timings['total']:.0f} ({timings['training']:.0f} of them training)"),
        ("tokens/s", f"{facts['tokens_per_s']:.0f} on {facts['world_size']} rank(s)"),
    ]
    return lines


def change_lines(changes: list[dict]) -> list[tuple[str, str]]:
    """How far the mask went, if it changed."""
    if not changes:
        return []
    last = changes[-1]["overlap_with_first"]
    return [("mask changes", f"{len(changes)}; overlap of the last mask with the first {last:.1%}")]


def score_lines(folder: Path) -> list[tuple[str, str]]:
    """Score lines of the tasks, before and after, with lm-eval's standard error."""
    lines = []
    for moment in ("before", "after"):
        path = folder / "eval" / f"{moment}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        lines += [(f"{what} {moment}", score) for what, score in scores_of(results)]
    return lines


def scores_of(results: dict) -> list[tuple[str, str]]:
    """(task and metric, score with its standard error) of lm-eval's results."""
    from speft_ds.evaluate import main_scores  # late: lm-eval takes its time, and not every run has scores

    lines = []
    for task, (metric, value, error) in main_scores(results).items():
        spread = f" ± {error:.1%}" if error is not None else ""
        lines.append((f"{task} {metric}", f"{value:.1%}{spread}"))
    return lines


def print_summary(folder: Path) -> None:
    """The table at the end of a run, and where everything lies."""
    table = Table(title=str(folder), show_header=False)
    for what, value in summary(folder):
        table.add_row(what, value)
    console = Console()
    console.print(table)
    for name, what in (
        ("adapter/", "what was learnt; apply it with speft_ds.apply_adapter(model, path)"),
        ("eval/", "lm-eval's results before and after"),
        ("metrics.jsonl", "one line a step"),
        ("run.json", "versions, mask, base, timings"),
        ("recipe.yaml", "the recipe with every default filled in"),
    ):
        if (folder / name).exists():
            console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True)
