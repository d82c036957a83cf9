"""How a run went over its steps, and where its time went, as sections of its report."""

from __future__ import annotations

from speft_ds.report.document import Block, Folded, Picture, Section, Table, Text
from speft_ds.report.pictures import HALF, Line, bars, curves, running_mean
from speft_ds.report.run import NUM_WARMUP, Run, is_number
from speft_ds.report.verdict import duration

# Stage of timings_s -> what it is; stages within another are marked.
STAGES = {
    "tasks": "finding the tasks",
    "data": "reading and tokenising rows",
    "model": "loading the model",
    "eval_before": "scoring before training",
    "salience": "scoring the weights",
    "selection": "selecting the mask",
    "resume": "taking up the checkpoint",
    "training": "training",
    "validation": "validation loss (within training)",
    "slices": "scoring slices (within training)",
    "checkpoints": "writing checkpoints (within training)",
    "save": "writing the adapter",
    "eval_after": "scoring after training",
}
WITHIN = ("validation", "slices", "checkpoints")
SMALL = {  # key of metrics.jsonl -> (axis, what the picture shows)
    "grad_norm": ("gradient norm", "the global norm of the sparse gradient before clipping"),
    "lr": ("learning rate", "the learning rate of each step"),
    "tokens_per_s": ("tokens/s", "tokens of the global batch over the seconds of the step, over all ranks"),
    "peak_memory_gib": (
        "GiB on rank 0",
        "the highest memory of rank 0 so far, since training began",
    ),
    "accuracy": ("accuracy", "rows of the global batch that the classifier got right"),
}


def curves_section(run: Run) -> Section:
    """Loss, validation loss and the rest over steps."""
    if not run.lines:
        return Section("Training", [Text("There is no step to show.")])
    starts = [start["step"] for start in run.starts[1:]]
    blocks: list[Block] = []
    steps, losses = run.series("loss")
    size = mean_size(len(losses))
    if losses:
        mean = running_mean(losses, size)
        lines = [Line("loss", steps, losses, 0, is_faint=True), Line("loss", steps, mean, 0)]
        lines += [Line("validation loss", *run.series("validation_loss"), 1)] * bool(
            run.series("validation_loss")[0]
        )
        alt = f"loss over steps, from {losses[0]:.4g} to {losses[-1]:.4g}"
        blocks.append(Picture("loss.svg", curves(lines, "loss (nats a label token)", starts), alt))
        blocks.append(Text(_how_loss(run, size, starts), is_small=True))
    shown = {key: run.series(key) for key in SMALL if run.series(key)[0]}
    for key, series in shown.items():
        axis, meaning = SMALL[key]
        picture = curves([Line("", *series)], axis, starts, HALF)
        blocks.append(Picture(f"{key}.svg", picture, f"{axis} over steps: {meaning}", is_small=True))
    if shown:
        how = "; ".join(f"{axis}: {meaning}" for axis, meaning in (SMALL[key] for key in shown))
        blocks.append(Text(f"How: {how}.", is_small=True))
    blocks += _scores_while_training(run)
    blocks.append(_numbers(run))
    if skipped := run.nonfinite_steps:
        what = (
            f"Steps whose loss or gradient was not finite, so that they changed nothing: {in_list(skipped)}."
        )
        blocks.append(Text(what))
    return Section("Training", blocks)


def mean_size(num_values: int) -> int:
    """How many steps the bold line of a loss averages over."""
    return max(1, num_values // 25)


def _how_loss(run: Run, size: int, starts: list[int]) -> str:
    unit = "row" if run.series("accuracy")[0] else "label token"
    parts = [
        f"How: the losses of a global batch, summed over all ranks, over its {unit}s. Thin: each step; bold: "
        f"the mean of the last {size} step(s)."
    ]
    if run.series("validation_loss")[0]:
        parts.append("Validation loss: the same on the rows of eval.validation, which are not trained on.")
    if starts:
        parts.append(f"Dotted: the run was started again after step {in_list(starts)}.")
    return " ".join(parts)


def in_list(numbers: list[int], most: int = 20) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(f"{number:,}" for number in numbers[:most]) + more


def _scores_while_training(run: Run) -> list[Block]:
    """Scores on small slices of the tasks, where metrics.jsonl has them."""
    lines = [line for line in run.lines if isinstance(line.get("scores"), dict)]
    names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    drawn = []
    for number, name in enumerate(names[:8]):
        found = [line for line in lines if is_number(line["scores"].get(name))]
        if found:
            values = [float(line["scores"][name]) for line in found]
            drawn.append(Line(str(name), [line["step"] for line in found], values, number))
    if not drawn:
        return []
    alt = f"scores over steps: {', '.join(line.label for line in drawn)}"
    how = "Scores while training are of small slices of the tasks: noisier than those before and after."
    return [Picture("scores.svg", curves(drawn, "score"), alt), Text(how, is_small=True)]


def _numbers(run: Run) -> Table:
    rows = []
    for key, what in (
        ("loss", "loss"),
        ("validation_loss", "validation loss"),
        ("grad_norm", "gradient norm"),
    ):
        steps, values = run.series(key)
        if values:
            low = min(range(len(values)), key=values.__getitem__)
            lowest = f"{values[low]:.4g} (step {steps[low]:,})"
            rows.append((what, f"{values[0]:.4g}", f"{values[-1]:.4g}", lowest, f"{max(values):.4g}"))
    return Table(("", "first", "last", "lowest", "highest"), rows)


def time_section(run: Run) -> Section:
    """Where the time went, by stage."""
    timings = {k: v for k, v in (run.fact("timings_s", dict) or {}).items() if is_number(v)}
    blocks: list[Block] = []
    if total := timings.pop("total", None):
        top = sum(seconds for stage, seconds in timings.items() if stage not in WITHIN)
        timings["other"] = max(total - top, 0.0)
    shown = {stage: seconds for stage, seconds in timings.items() if seconds >= 0.001 * (total or 0.0)}
    order = sorted(shown, key=lambda stage: -shown[stage])
    names = [STAGES.get(stage, "all else" if stage == "other" else stage) for stage in order]
    if order:
        picture = bars(names, [shown[stage] for stage in order], "seconds", _seconds)
        alt = "seconds by stage: " + ", ".join(
            f"{n} {_seconds(shown[s])}" for n, s in zip(names, order, strict=True)
        )
        blocks.append(Picture("time.svg", picture, alt))
    else:
        blocks.append(Text("run.json has no timings: they are written at the end of a run."))
    how = "How: wall-clock seconds on rank 0."
    how += f" Of the whole process: {duration(total)}." if total else ""
    if len(run.starts) > 1:
        how += f" The run was started {len(run.starts)} times; these are of its last start alone."
    blocks.append(Text(how, is_small=True))
    if tokens := run.tokens_per_s:
        rows = [
            ("all steps, over all starts", duration(run.step_seconds)),
            (f"tokens/s, without the first {NUM_WARMUP} steps", f"{tokens:,.0f}"),
        ]
        blocks.append(Table(("steps", ""), rows))
    return Section("Where the time went", blocks)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def starts_block(run: Run) -> Folded | None:
    """The processes that made the run, where there was more than one."""
    if len(run.starts) < 2:
        return None
    rows = [
        (str(number), f"{start['step']:,}", str(start.get("world_size", "unknown")))
        for number, start in enumerate(run.starts, 1)
    ]
    return Folded(f"started {len(rows)} times", [Table(("start", "after step", "ranks"), rows)])
