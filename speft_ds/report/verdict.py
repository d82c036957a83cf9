"""The result of a run in plain words, computed from its numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from speft_ds.evaluation.scores import ScoreChange, ScoreFile
from speft_ds.report.run import RunFolder

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
        sentences.append(f"The perplexity of general text {_moved(old, new)}{change}.")
    return sentences


def _moved(old: float, new: float, when: str = "") -> str:
    if new == old:
        return f"stayed at {old:.4g}"
    return f"{'rose' if new > old else 'fell'} from {old:.4g}{when} to {new:.4g}"


def _losses(run: RunFolder) -> list[str]:
    sentences = []
    for key, what in (("validation_loss", "validation loss"), ("loss", "training loss")):
        steps, values = run.series(key)
        if len(values) > 1:
            lowest = steps[values.index(min(values))]
            sentences.append(
                f"The {what} {_moved(values[0], values[-1], f' (step {steps[0]:,})')}; it was "
                f"lowest at step {lowest:,} ({min(values):.4g})."
            )
    if skipped := run.nonfinite_steps:
        sentences.append(f"{len(skipped)} step(s) were skipped: their loss or gradient was not finite.")
    return sentences


def how_scored(evaluations: Sequence[ScoreFile], but: Collection[str] = ()) -> str:
    """How the numbers of a table were made.

    Args:
        but: settings that the table itself says.
    """
    settings = dict.fromkeys(_settings(found, {"format", "format_text", *but}) for found in evaluations)
    parts = [f"How: {' / '.join(settings)}; all else as the task says."]
    parts.append("± is lm-eval's standard error over documents, not over seeds.")
    versions = {
        s.task: f"{s.task} {s.version}" for e in evaluations for s in e.scores if s.version is not None
    }
    if 0 < len(versions) <= 15:
        parts.append(f"Versions of the tasks: {', '.join(versions.values())}.")
    if seconds := [f"{e.label} {e.seconds:.0f}" for e in evaluations if e.seconds is not None]:
        parts.append(f"Seconds: {', '.join(seconds)}.")
    if cached := [found.label for found in evaluations if found.cached]:
        parts.append(f"Cached by an earlier run with the same base and tasks: {', '.join(cached)}.")
    return " ".join(parts)


def _settings(found: ScoreFile, but: Collection[str]) -> str:
    """`lm_eval 0.4.13, limit 500`."""
    known = found.settings.model_dump(exclude=but, exclude_none=True)
    return ", ".join(f"{key} {value}" for key, value in known.items())
