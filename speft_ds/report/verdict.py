"""The result of a run in plain words, computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from speft_ds.report.run import RunFolder
from speft_ds.report.scores import ScoreChange, ScoreFile, Settings

MAX_NAMED = 3
STARTS = {"better": "Better", "worse": "Worse", "no clear change": "Not clearly changed"}
AGAINST = {"better": "beats", "worse": "is beaten by", "no clear change": "is about as good as"}


def verdict_of(run: RunFolder) -> list[str]:
    """Two paragraphs: how far it came, what got better, what got worse, against what; how the losses went."""
    losses = " ".join(_losses(run))
    return [" ".join([_progress(run), *_scores(run), *_forgetting(run)]), *([losses] if losses else [])]


def _progress(run: RunFolder) -> str:
    steps = f"{run.num_done:,} of {run.num_steps:,} steps" if run.num_steps else f"{run.num_done:,} steps"
    if run.is_finished:
        return f"The run is finished: {steps}."
    if not run.facts:
        return f"Without run.json, nobody knows whether the run is finished; {steps} are done."
    return f"The run is not finished: {steps} are done, and everything below is preliminary."


def _scores(run: RunFolder) -> list[str]:
    found, scored = run.evaluations.changes(), run.evaluations.main_scores()
    if not scored:
        return ["It was not scored on tasks."]
    if not found:
        names = ", ".join(f"{score.name} {score}" for score in scored[:MAX_NAMED])
        return [f"It was scored only {'after' if run.evaluations.after else 'before'} training: {names}."]
    sentences = []
    for verdict, start in STARTS.items():
        of_it = [change for change in found if change.verdict == verdict]
        of_it.sort(key=lambda change: -abs(change.num_errors or 0.0))
        more = f", and {len(of_it) - MAX_NAMED} more tasks" if len(of_it) > MAX_NAMED else ""
        sentences += [f"{start}: {_in_words(of_it)}{more}."] if of_it else []
    for prompt, change in run.evaluations.best_prompts()[:1]:
        sentences.append(
            f"On {change.after.name} the tuned model {AGAINST[change.verdict]} the best prompt by hand "
            f"({prompt}, {change.before.short}; {change.errors_text()} apart)."
        )
    return sentences


def _in_words(found: list[ScoreChange]) -> str:
    """`arc_easy acc from 41.0% to 44.6% (+3.6 points, 2.5 standard errors); ...`."""
    return "; ".join(
        f"{change.after.name} from {change.before.short} to {change.after.short} "
        f"({change.short}, {change.errors_text()})"
        for change in found[:MAX_NAMED]
    )


def _forgetting(run: RunFolder) -> list[str]:
    worse = [change for change in run.evaluations.changes("forgetting") if change.verdict == "worse"]
    sentences = [f"Forgotten: {_in_words(worse)}."] if worse else []
    old, new = run.evaluations.perplexities
    if old and new:
        old, new = old.token_perplexity, new.token_perplexity
        change = f" ({new / old - 1:+.1%})" if old else ""
        moved = "rose" if new > old else "fell"
        sentences.append(f"The perplexity of general text {moved} from {old:.4g} to {new:.4g}{change}.")
    return sentences


def _losses(run: RunFolder) -> list[str]:
    sentences = []
    for key, what in (("held_out_loss", "held-out loss"), ("loss", "training loss")):
        steps, values = run.series(key)
        if len(values) < 2:
            continue
        moved = "fell" if values[-1] < values[0] else "rose"
        sentence = f"The {what} {moved} from {values[0]:.4g} (step {steps[0]:,}) to {values[-1]:.4g}"
        lowest = min(values)
        if key == "held_out_loss" and lowest < values[-1]:
            sentence += f"; it was lowest at step {steps[values.index(lowest)]:,} ({lowest:.4g})"
        sentences.append(f"{sentence}.")
    if skipped := run.nonfinite_steps:
        sentences.append(f"{len(skipped)} step(s) were skipped: their loss or gradient was not finite.")
    return sentences


def how_scored(evaluations: Sequence[ScoreFile], shots: str = "") -> str:
    """How the numbers of a table were made; `shots`: what to say of the examples in the prompt."""
    settings = dict.fromkeys(_settings(found.settings, shots) for found in evaluations)
    parts = [f"How: {' / '.join(settings)}. ± is lm-eval's standard error over documents, not over seeds."]
    versions = {s.task: s.version for e in evaluations for s in e.scores if s.version is not None}
    if 0 < len(versions) <= 15:
        named = ", ".join(f"{task} {version}" for task, version in versions.items())
        parts.append(f"Versions of the tasks: {named}.")
    if seconds := [f"{e.label} {e.seconds:.0f}" for e in evaluations if e.seconds is not None]:
        parts.append(f"Seconds: {', '.join(seconds)}.")
    if cached := [found.label for found in evaluations if found.cached]:
        parts.append(f"Cached by an earlier run with the same base and tasks: {', '.join(cached)}.")
    return " ".join(parts)


def _settings(its: Settings, shots: str) -> str:
    own = "each task's own number of examples in the prompt"
    parts = [
        f"lm-eval {its.lm_eval or ''}".rstrip(),
        shots or (own if its.num_fewshot is None else f"{its.num_fewshot}-shot"),
        f"the first {its.limit} documents of a task" if its.limit else "all documents",
        its.chat_template is not None and f"chat template {'on' if its.chat_template else 'off'}",
        its.format and f"prompt format {its.format}",
        its.seed is not None and f"seed {its.seed}",
        its.batch_size is not None and f"batches of {its.batch_size}",
        its.world_size is not None and f"{its.world_size} rank(s)",
        its.mode,
    ]
    return ", ".join(part for part in parts if part)
