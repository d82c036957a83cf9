"""The report of one run, a pure function of its folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from speft_ds.adapter.card import data_names, hyperparameters
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.inspect import mask_counts
from speft_ds.config.load_recipe import as_override
from speft_ds.config.mask_config import MASK_FILE
from speft_ds.errors import UserError, shell
from speft_ds.evaluation.samples import MAX_TEXT, read_answers
from speft_ds.evaluation.scores import CLEAR, Evaluations, Score, ScoreChange, in_text
from speft_ds.hub import public_name
from speft_ds.report.plots import Curve, bars, curves, mask_heat_map, running_mean
from speft_ds.report.render import Picture, write_pages
from speft_ds.report.run import ADAPTER, NUM_WARMUP, RunFolder, is_number, look_up, numbers, read_run, size_of
from speft_ds.report.summary import STAGES, WITHIN, key_figures, seconds_by_stage
from speft_ds.report.tables import in_bytes
from speft_ds.sparse.mask import read_mask
from speft_ds.training.run_dir import RECIPE
from speft_ds.untrusted import without_folders

Rows = list[tuple[Any, ...]]  # of tables; a dash stands for None

# Key of metrics.jsonl -> (axis, meaning) of a small picture.
SMALL = {
    "grad_norm": ("gradient norm", "the global norm of the sparse gradient before clipping"),
    "lr": ("learning rate", "the learning rate of each step"),
    "tokens_per_s": ("tokens/s", "tokens of the global batch over the seconds of the step, over all ranks"),
    "peak_memory_gib": ("GiB on rank 0", "the highest memory of rank 0 so far, since training began"),
    "accuracy": ("accuracy", "the share of the global batch that the classifier got right"),
}
FROM_ZERO = ("tokens_per_s", "peak_memory_gib", "lr")  # axes
MAX_TASKS = 3  # of which documents are shown
NUM_AVERAGED = 10  # steps at both ends of a format of stashed activations


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
        "head": head(run),
        "notes": [*run.problems, *run.evaluations.notes],
        "figures": key_figures(run, max_scores=2)[:6],
        "pictures": {**_curves(run), **heat_map, **_stages(run)},
        "small_curves": [(f"{key}.svg", *SMALL[key]) for key in SMALL if run.series(key)[0]],
        "no_heat_map": no_heat_map,
        "run": run,
        "before_after": lambda scores: _before_after(run.evaluations, scores),
        "clear": f"{CLEAR:g}",
        **_prompting(run.evaluations),
        "perplexities": _perplexities(run.evaluations),
        **_answers(run),
        "hyperparameters": hyperparameters(run.recipe),
        "spreads": spreads,
        "formats": formats,
        "mean_size": _mean_size(run.series("loss")[1]),
        "change_keys": keys,
        "stashed": [_stash_row(name, lines) for name, lines in run.stashed],
        "num_averaged": NUM_AVERAGED,
        "mask_changes": [[change.get(key) for key in keys] for change in changes],
        "num_warmup": NUM_WARMUP,
        "checkpoints": [(c.path.name, in_bytes(size_of(c.path))) for c in run.checkpoints],
        "starts": [
            (start["step"], start.get("world_size"), look_up(start, "date", ""), _command(start))
            for start in run.starts
        ],
        "commands": _commands(run),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
    }


def head(run: RunFolder) -> list[tuple[str, str]]:
    """(what, which) of model, data, recipe, date, machine, command line and commit, as far as they are known.

    Of paths of the machine, only their last parts.
    """
    base = run.fact("base.name_or_path", "") or run.setting("model.name_or_path", "")
    rows, start = run.fact("data.rows", 0), run.starts[0] if run.starts else {}
    processor = run.fact("machine.gpu", "") or run.fact("machine.cpu", "")
    cores = run.fact("machine.num_cores", 0)
    machine = [processor, f"{cores} cores" if cores else "", f"{run.num_ranks} rank(s)" * bool(run.num_ranks)]
    commits = look_up(start, "commits", {})
    known = {
        "model": public_name(base),
        "base format": run.fact("base.stored", ""),
        "data": ", ".join([*data_names(run.recipe), *([f"{rows:,} rows"] if rows else [])]),
        "recipe": run.fact("recipe", ""),
        "date": "; again ".join(date for each in run.starts if (date := look_up(each, "date", ""))),
        "machine": ", ".join(filter(None, machine)),
        "command line": _command(start),
        "commit": ", ".join(f"{commit} ({of})" for of, commit in commits.items()),
    }
    return [(what, which) for what, which in known.items() if which]


def _command(start: dict[str, Any]) -> str:
    """The command line of a start, without folders of the machine."""
    try:
        words = shlex.split(look_up(start, "command", ""))
    except ValueError:
        return ""
    return shell(*map(without_folders, words))


def _answers(run: RunFolder) -> dict[str, Any]:
    """Documents before and after training: how many changed, and some of them."""
    tasks, others = read_answers(run.folder, run.evaluations)
    counts = [(task.name, sum(task.counts.values()), *task.counts.values()) for task in tasks]
    shown = []
    for task in tasks[:MAX_TASKS]:
        for kind, old, new in task.shown:
            change = f"{kind}, from {old.value:g} to {new.value:g}"
            if task.is_right_or_wrong:
                change = f"{'stayed' if kind == 'same' else 'became'} {'right' if new.value else 'wrong'}"
            texts = (
                ("prompt", new.prompt),
                ("expected", new.expected),
                ("before", old.answer),
                ("after", new.answer),
            )
            shown.append((f"{task.name}, document {old.document}: {change}", texts))
    return {
        "answer_counts": counts,
        "answers": shown,
        "without_answers": others,
        "max_text": MAX_TEXT,
    }


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


def _stash_row(name: str, lines: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The steps of one format, and how the loss went in them."""
    losses = [line["loss"] for line in lines if is_number(line.get("loss"))]
    ends = (losses[:NUM_AVERAGED], losses[-NUM_AVERAGED:])
    return name, lines[0]["step"], lines[-1]["step"], *(mean(some) if some else None for some in ends)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last 4% of the steps, at each."""
    return running_mean(values, _mean_size(values))


def _mean_size(values: Sequence[float]) -> int:
    return max(1, len(values) // 25)


def _commands(run: RunFolder) -> str:
    folder, on_cpu = run.folder.as_posix(), run.fact("machine.device", "") == "cpu"
    ranks = ["--ranks", run.num_ranks] if run.num_ranks else []
    again = as_override("output_dir", f"{folder}-again")
    commands = [
        shell("speft", "train", f"{folder}/{RECIPE}", again, *ranks),
        shell("speft", "evaluate", folder, *ranks),
    ]
    lines = [f"{'DS_ACCELERATOR=cpu ' * on_cpu}{command}" for command in commands]
    return "\n".join([*lines, shell("speft", "report", folder)])


# Pictures, by the name of their file


def _curves(run: RunFolder) -> dict[str, Picture]:
    """Loss, validation loss and the rest over steps."""
    restarts = [start["step"] for start in run.starts[1:]]
    pictures = {}
    steps, losses = run.series("loss")
    if losses:
        is_smoothed = _mean_size(losses) > 1
        lines = [Curve("loss", steps, losses, is_faint=True)] * is_smoothed
        lines.append(Curve("loss", steps, smoothed(losses)))
        if run.series("validation_loss")[0]:
            lines.append(Curve("validation loss", *run.series("validation_loss"), 1))
        alt = f"loss over steps, from {losses[0]:.4g} to {losses[-1]:.4g}"
        pictures["loss.svg"] = Picture(curves(lines, "loss", restarts), alt, is_small=True)
    for key, (axis, meaning) in SMALL.items():
        if run.series(key)[0]:
            drawn = curves([Curve("", *run.series(key))], axis, restarts, key in FROM_ZERO)
            pictures[f"{key}.svg"] = Picture(drawn, f"{axis} over steps: {meaning}", is_small=True)
    if lines := _scores_while_training(run):
        alt = f"scores over steps: {', '.join(line.label for line in lines)}"
        pictures["scores.svg"] = Picture(curves(lines, "score"), alt, is_small=True)
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
    shown = seconds_by_stage(run, min_share=0.001)
    if not shown:
        return {}
    alt = "seconds by stage: " + ", ".join(f"{name} {_seconds(value)}" for name, value in shown.items())
    faint = [STAGES[stage] for stage in WITHIN]
    return {"time.svg": Picture(bars(list(shown), list(shown.values()), "seconds", _seconds, faint), alt)}


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
