"""The report of one run, a pure function of its folder, and its key figures as a table for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from speft_ds.adapter.format import Adapter
from speft_ds.adapter.inspect import mask_counts
from speft_ds.config.mask_config import MASK_FILE
from speft_ds.errors import UserError
from speft_ds.evaluation.scores import CLEAR, Evaluations, Score, ScoreChange, in_text
from speft_ds.report.plots import HALF, Curve, bars, curves, mask_heat_map, running_mean
from speft_ds.report.render import Picture, write_pages
from speft_ds.report.run import ADAPTER, NUM_WARMUP, RunFolder, look_up, numbers, read_run, size_of
from speft_ds.report.tables import duration, in_bytes, plain
from speft_ds.sparse.mask import read_mask
from speft_ds.training.run_dir import RECIPE

Rows = list[tuple[Any, ...]]  # of tables; a dash stands for None

# Key of metrics.jsonl -> (axis, meaning) of a small picture.
SMALL = {
    "grad_norm": ("gradient norm", "the global norm of the sparse gradient before clipping"),
    "lr": ("learning rate", "the learning rate of each step"),
    "tokens_per_s": ("tokens/s", "tokens of the global batch over the seconds of the step, over all ranks"),
    "peak_memory_gib": ("GiB on rank 0", "the highest memory of rank 0 so far, since training began"),
    "accuracy": ("accuracy", "the share of the global batch that the classifier got right"),
}
STAGES = {
    "tasks": "finding the tasks",
    "data": "reading and tokenizing rows",
    "model": "loading the model",
    "eval_before": "scoring before training",
    "salience": "scoring the weights",
    "selection": "selecting the mask",
    "resume": "loading the checkpoint",
    "training": "training",
    "validation": "validation loss (within training)",
    "slices": "scoring slices (within training)",
    "checkpoints": "writing checkpoints (within training)",
    "save": "writing the adapter",
    "eval_after": "scoring after training",
    "other": "all else",
}
WITHIN = ("validation", "slices", "checkpoints")
FILES = {
    "report.html": "all of this and more, for a browser",
    "adapter/": "the trained entries; apply them with speft_ds.apply_adapter(model, path)",
    "eval/": "scores before and after",
    "metrics.jsonl": "one line per step",
    "run.json": "versions, mask, base, timings",
    "recipe.yaml": "the recipe with every default filled in",
}


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the report of a run, as markdown and as a page, from its folder alone; the same every time.

    Args:
        output: where it goes; None: into the run folder.
    Returns:
        The files: report.html and report.md.
    Raises:
        UserError: the folder is not a run folder, or the report cannot be written.
    """
    return write_pages(output or folder, "run", **context_of(read_run(folder)))


def context_of(run: RunFolder) -> dict[str, Any]:
    """What the templates show."""
    heat_map, no_heat_map = _heat_map(run)
    spreads, formats = _formats(run.evaluations)
    changes = [numbers(change) for change in run.fact("mask.changes", [])]
    keys = list(changes[-1]) if changes else []
    return {
        "title": f"Run {run.name}",
        "notes": run.problems,
        "figures": key_figures(run, max_scores=2)[:6],
        "pictures": {**_curves(run), **heat_map, **_stages(run)},
        "small_curves": [(f"{key}.svg", *SMALL[key]) for key in SMALL if run.series(key)[0]],
        "no_heat_map": no_heat_map,
        "run": run,
        "before_after": lambda scores: _before_after(run.evaluations, scores),
        "clear": f"{CLEAR:g}",
        **_prompting(run.evaluations),
        "perplexities": _perplexities(run.evaluations),
        "spreads": spreads,
        "formats": formats,
        "mean_size": _mean_size(run.series("loss")[1]),
        "change_keys": keys,
        "mask_changes": [[change.get(key) for key in keys] for change in changes],
        "num_warmup": NUM_WARMUP,
        "checkpoints": [(c.path.name, in_bytes(size_of(c.path))) for c in run.checkpoints],
        "starts": [(start["step"], start.get("world_size")) for start in run.starts],
        "commands": _commands(run),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
    }


def print_summary(folder: Path) -> None:
    """Print the key figures of a run, and where everything lies.

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
    """Of adapter, mask and head, memory and communication."""
    trained, targets = run.fact("mask.num_trainable", 0), run.fact("mask.num_target_elements", 0)
    rows = []
    if run.adapter_bytes:
        entries = numbers(run.adapter).get("num_entries") or trained
        each = f"{entries:,} entries, {run.adapter_bytes / entries:.2f} bytes each" if entries else ""
        rows.append(("adapter", in_bytes(run.adapter_bytes), each))
    if trained and targets:
        rows.append(("trained entries", f"{trained:,}", f"of {targets:,} ({trained / targets:.4%})"))
    if run.fact("data.rows_read", 0):
        rows.append(_rows_trained(run))
    if head := run.fact("head", 0):
        rows.append(("fully trained head", f"{head:,}", "weights"))
    if changes := run.fact("mask.changes", []):
        overlap = look_up(changes[-1], "overlap_with_first", 0.0)
        rows.append(
            ("mask changes", f"{len(changes)}", f"overlap of the last mask with the first {overlap:.1%}")
        )
    if total := run.fact("timings_s.total", 0):
        rows.append(("total time", duration(total), "of the last start"))
    peak, memory, sent = run.resources
    for what, size, kinds in (
        ("peak memory per rank", peak, memory),
        ("sent per rank per step", sum(sent.values()), sent),
    ):
        largest = sorted(kinds, key=kinds.get, reverse=True)[:3]
        named = ", ".join(f"{kind} {in_bytes(kinds[kind])}" for kind in largest)
        rows += [(what, in_bytes(size), named)] if kinds else []
    return rows


def _rows_trained(run: RunFolder) -> tuple[str, str, str]:
    left_out = [f"{number:,} {why}" for why, number in numbers(run.fact("data.left_out", {})).items()]
    how = f"of {run.fact('data.rows_read', 0):,} read; left out: {', '.join(left_out) or 'none'}"
    size = f"{run.fact('data.label_tokens', 0):,} label tokens, {run.fact('data.epochs', 0.0):.3g} epochs"
    return "training rows", f"{run.fact('data.rows', 0):,}", f"{how}; {size}"


def _before_after(found: Evaluations, scores: Iterable[Score]) -> Rows:
    rows = []
    for score in scores:
        old, new = found.both(score)
        change = ScoreChange(old, new) if old and new else None
        name = score.name + ("" if score.higher_is_better else " (lower is better)")
        rows.append((name, score.num_documents, old, new, change, change and change.verdict_text))
    return rows


def _prompting(found: Evaluations) -> dict[str, Any]:
    """The base with examples in its prompt, beside the tuned model."""
    prompts = {f"base, {prompt}": base for prompt, base in found.by_prompt().items()}
    if found.after:
        prompts[f"tuned, {found.after.prompt}"] = found.after
    names = {score.key: score.name for each in prompts.values() for score in each.main_scores()}
    return {
        "prompts": list(prompts.items()),
        "prompted": [(name, *(each.score(key) for each in prompts.values())) for key, name in names.items()],
        "best_prompts": [
            (change.after.name, f"{prompt}, {change.before}", change, change.verdict_text)
            for prompt, change in found.best_prompts()
        ],
    }


def _perplexities(found: Evaluations) -> Rows:
    rows = []
    for key in ("token_perplexity", "byte_perplexity"):
        old, new = (getattr(each, key) if each else None for each in found.perplexities)
        change = f"{new / old - 1:+.1%}" if old and new else None
        rows.append((f"{key.replace('_', ' ')} (lower is better)", old, new, change))
    return rows if any(found.perplexities) else []


def _formats(found: Evaluations) -> tuple[Rows, Rows]:
    """How far each score depends on the wording of the prompt, and the scores with each wording."""
    spreads, formats = [], []
    for model in ("base", "tuned"):
        by_format = found.by_format(model)
        for number, each in by_format.items():
            what = each.settings.format_text or (None if number else "the task's own")
            formats += [(number, what, f"{s.name}, {model}", s) for s in each.main_scores()]
        for main in list(by_format.values())[-1].main_scores() if len(by_format) > 1 else []:
            scores = [score for each in by_format.values() if (score := each.score(main.key))]
            values, is_share = [score.value for score in scores], all(score.is_share for score in scores)
            texts = [in_text(of(values), None, is_share) for of in (min, median, max)]
            spread = in_text(max(values) - min(values), None, is_share, signed=True).removeprefix("+")
            spreads.append((f"{main.name}, {model}", len(scores), *texts, spread))
    return spreads, sorted(formats, key=lambda row: row[0])


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last 4% of the steps, at each."""
    return running_mean(values, _mean_size(values))


def _mean_size(values: Sequence[float]) -> int:
    return max(1, len(values) // 25)


def _commands(run: RunFolder) -> str:
    folder, on_cpu = run.folder.as_posix(), run.fact("machine.device") == "cpu"
    start = f"{'DS_ACCELERATOR=cpu ' * on_cpu}deepspeed --num_gpus {run.num_ranks or 1}"
    recipe, again = shlex.quote(f"{folder}/{RECIPE}"), shlex.quote(f"output_dir={folder}-again")
    return (
        f"{start} launch/train.py --recipe {recipe} {again}\n"
        f"{start} launch/evaluate.py --run {shlex.quote(folder)}\n"
        f"speft report {shlex.quote(folder)}"
    )


# Pictures, by the name of their file


def _curves(run: RunFolder) -> dict[str, Picture]:
    """Loss, validation loss and the rest over steps."""
    restarts = [start["step"] for start in run.starts[1:]]
    pictures = {}
    steps, losses = run.series("loss")
    if losses:
        lines = [Curve("loss", steps, losses, is_faint=True), Curve("loss", steps, smoothed(losses))]
        if run.series("validation_loss")[0]:
            lines.append(Curve("validation loss", *run.series("validation_loss"), 1))
        alt = f"loss over steps, from {losses[0]:.4g} to {losses[-1]:.4g}"
        pictures["loss.svg"] = Picture(curves(lines, "loss (nats per label token)", restarts), alt)
    for key, (axis, meaning) in SMALL.items():
        if run.series(key)[0]:
            drawn = curves([Curve("", *run.series(key))], axis, restarts, HALF)
            pictures[f"{key}.svg"] = Picture(drawn, f"{axis} over steps: {meaning}", is_small=True)
    if lines := _scores_while_training(run):
        alt = f"scores over steps: {', '.join(line.label for line in lines)}"
        pictures["scores.svg"] = Picture(curves(lines, "score"), alt)
    return pictures


def _scores_while_training(run: RunFolder) -> list[Curve]:
    """Scores of small slices of the tasks, where metrics.jsonl has them."""
    scored = [(line["step"], numbers(line.get("scores"))) for line in run.lines]
    lines = []
    for colour, name in enumerate(list(dict.fromkeys(name for _, scores in scored for name in scores))[:8]):
        steps = [step for step, scores in scored if name in scores]
        values = [scores[name] for _, scores in scored if name in scores]
        lines.append(Curve(name, steps, values, colour))
    return lines


def _stages(run: RunFolder) -> dict[str, Picture]:
    """Seconds by stage, the longest first."""
    timings = numbers(run.fact("timings_s"))
    if total := timings.pop("total", 0.0):
        known = sum(seconds for stage, seconds in timings.items() if stage not in WITHIN)
        timings["other"] = max(total - known, 0.0)
    shown = {STAGES.get(stage, stage): s for stage, s in timings.items() if s >= 0.001 * total}
    if not shown:
        return {}
    shown = dict(sorted(shown.items(), key=lambda pair: -pair[1]))
    alt = "seconds by stage: " + ", ".join(f"{name} {_seconds(value)}" for name, value in shown.items())
    return {"time.svg": Picture(bars(list(shown), list(shown.values()), "seconds", _seconds), alt)}


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _heat_map(run: RunFolder) -> tuple[dict[str, Picture], str]:
    """Where the entries of the adapter lie, or those of a mask that was only selected; or why not."""
    try:
        if (run.folder / ADAPTER).is_dir():
            mask, what = mask_counts(Adapter.open(run.folder / ADAPTER)), "entries that the adapter holds"
        elif (run.folder / MASK_FILE).is_file():
            mask, what = read_mask(run.folder / MASK_FILE)[0], "entries of the selected mask"
        else:
            return {}, "the folder has no adapter and no mask"
    except UserError as error:
        return {}, error.what
    if not mask.shape:
        return {}, "the adapter holds no entry"
    content = mask_heat_map(mask, f"{run.name}: {what}", "svg")
    return {"mask.svg": Picture(content, f"{what}, by layer and module")}, ""
