"""What a run came to, in plain words computed from its numbers."""

from __future__ import annotations

import math

from speft_ds.evaluation.scores import Change, changes
from speft_ds.report.run import Run
from speft_ds.report.score_sections import best_prompts

MOST_NAMED = 3


def verdict_of(run: Run) -> str:
    """One paragraph: how far it came, what got better, what got worse, against what."""
    return " ".join([_progress(run), *_scores(run), *_prompting(run), *_forgetting(run)])


def course_of(run: Run) -> str:
    """One paragraph: what became of the losses, and what that took."""
    return " ".join([*_losses(run), *_cost(run)])


def _progress(run: Run) -> str:
    steps = f"{run.num_done:,} of {run.num_steps:,} steps" if run.num_steps else f"{run.num_done:,} steps"
    if run.is_finished:
        return f"The run is finished: {steps}."
    if not run.facts:
        return f"Whether the run is finished is not known, without its run.json: {steps} are made."
    return f"The run is not finished: {steps} are made, so all below is of the moment."


def _scores(run: Run) -> list[str]:
    found = changes(run.evaluations.before, run.evaluations.after)
    if not found:
        after = run.evaluations.after or run.evaluations.before
        if after is None or not after.main_scores():
            return ["It was not scored on tasks."]
        names = ", ".join(f"{score.name} {score.text}" for score in after.main_scores()[:MOST_NAMED])
        moment = "after" if run.evaluations.after else "before"
        return [f"It was scored only {moment} training: {names}."]
    sentences = []
    for verdict, start in (
        ("better", "Better"),
        ("worse", "Worse"),
        ("no clear change", "Not clearly changed"),
    ):
        of_it = [change for change in found if change.verdict == verdict]
        of_it.sort(key=lambda change: -abs(change.num_errors or 0.0))
        if of_it:
            more = f", and {len(of_it) - MOST_NAMED} more tasks" if len(of_it) > MOST_NAMED else ""
            sentences.append(f"{start}: {'; '.join(map(in_words, of_it[:MOST_NAMED]))}{more}.")
    return sentences


def in_words(change: Change) -> str:
    """`arc_easy acc from 41.0% to 44.6% (+3.6 points, 2.5 standard errors)`."""
    before, after = change.before.short_text, change.after.short_text
    return f"{change.after.name} from {before} to {after} ({change.short_text}, {change.errors_text()})"


def _prompting(run: Run) -> list[str]:
    """Against the best prompt by hand, of the first task."""
    if not run.evaluations.of("fewshot", "base"):
        return []
    sentences = []
    for prompt, change in best_prompts(run.evaluations)[:1]:
        words = {"better": "beats", "worse": "is beaten by", "no clear change": "is about as good as"}
        sentences.append(
            f"On {change.after.name} the tuned model {words[change.verdict]} the best prompt by hand "
            f"({prompt}, {change.before.short_text}; {change.errors_text()} apart)."
        )
    return sentences


def _losses(run: Run) -> list[str]:
    sentences = []
    for key, what in (("validation_loss", "validation loss"), ("loss", "training loss")):
        steps, values = run.series(key)
        if len(values) > 1:
            moved = "fell" if values[-1] < values[0] else "rose"
            sentence = f"The {what} {moved} from {values[0]:.4g} (step {steps[0]:,}) to {values[-1]:.4g}"
            lowest = min(range(len(values)), key=values.__getitem__)
            if key == "validation_loss" and values[lowest] < values[-1]:
                sentence += f"; it was lowest at step {steps[lowest]:,} ({values[lowest]:.4g})"
            sentences.append(f"{sentence}.")
    if skipped := run.nonfinite_steps:
        sentences.append(f"{len(skipped)} step(s) were skipped: their loss or gradient was not finite.")
    return sentences


def _forgetting(run: Run) -> list[str]:
    before, after = run.evaluations.before, run.evaluations.after
    worse = [change for change in changes(before, after, "forgetting") if change.verdict == "worse"]
    sentences = [f"Forgotten: {'; '.join(map(in_words, worse[:MOST_NAMED]))}."] if worse else []
    if before and after and before.perplexity and after.perplexity:
        old, new = before.perplexity.token_perplexity, after.perplexity.token_perplexity
        change = f" ({new / old - 1:+.1%})" if old else ""
        moved = "rose" if new > old else "fell"
        sentences.append(f"The perplexity of general text {moved} from {old:.4g} to {new:.4g}{change}.")
    return sentences


def _cost(run: Run) -> list[str]:
    trained, density = run.fact("mask.num_trainable", int), run.fact("mask.density", float)
    parts = []
    if trained is not None:
        share = f" ({density:.2%} of those targeted)" if density else ""
        parts.append(f"trained {trained:,} weights{share}")
    if run.step_seconds:
        ranks = run.fact("world_size", int)
        on_ranks = f" on {ranks} rank(s)" if ranks else ""
        parts.append(f"took {duration(run.step_seconds)} in steps{on_ranks}")
    if run.adapter_bytes:
        parts.append(f"left an adapter of {run.adapter_bytes / 2**20:.2f} MiB")
    return [f"It {', '.join(parts)}."] if parts else []


def duration(seconds: float) -> str:
    """`42 s`, `5 min 31 s`, `3 h 7 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
