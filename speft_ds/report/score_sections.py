"""What the scores of a run come to, as sections of its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from speft_ds.evaluation.scores import CLEAR, Change, Evaluation, Evaluations, Score, Settings, in_text
from speft_ds.report.document import Block, Folded, Section, Table, Text

MOST_ROWS = 15  # main scores in a table; the others are folded
NONE = "-"
HOW_COMPARED = (
    "The error of a change is √(before² + after²), as if both had been scored on different documents; on the "
    "same ones it is usually smaller, so the verdict is careful. "
    f"From {CLEAR:g} standard errors (s.e.) on a change is called better or worse."
)


def score_sections(evaluations: Evaluations) -> list[Section]:
    """Scores before and after, what prompting alone reaches, other prompts, what was forgotten."""
    makers: list[Callable[[Evaluations], Section | None]] = [
        scores_section,
        fewshot_section,
        format_section,
        forgetting_section,
        extra_section,
    ]
    return [section for section in (make(evaluations) for make in makers) if section is not None]


def scores_section(evaluations: Evaluations) -> Section:
    before, after = evaluations.before, evaluations.after
    if before is None and after is None:
        what = "No task was scored: the recipe names none (eval.tasks), or the run did not come so far."
        return Section("Scores", [Text(what)])
    names = [score.key for score in (after or before).main_scores()]
    blocks: list[Block] = [_before_after(before, after, names[:MOST_ROWS])]
    if names[MOST_ROWS:]:
        title = f"{len(names) - MOST_ROWS} more tasks"
        blocks.append(Folded(title, [_before_after(before, after, names[MOST_ROWS:])]))
    blocks.append(Text(f"{how_scored([e for e in (before, after) if e])} {HOW_COMPARED}", is_small=True))
    everything = [s.key for s in (after or before).scores if s.role == "task"]
    if len(everything) > len(names):
        blocks.append(Folded("every metric and filter", [_before_after(before, after, everything)]))
    return Section("Scores", blocks)


def _before_after(before: Evaluation | None, after: Evaluation | None, keys: Iterable[tuple]) -> Table:
    rows = []
    for key in keys:
        old, new = before and before.score(key), after and after.score(key)
        change = Change(old, new) if old and new else None
        some = new or old
        rows.append(
            (
                some.name + ("" if some.higher_is_better else " (lower is better)"),
                documents(some),
                old.text if old else NONE,
                new.text if new else NONE,
                change.text if change else NONE,
                verdict(change) if change else NONE,
            )
        )
    return Table(("task, metric", "documents", "before", "after", "change", "verdict"), rows)


def verdict(change: Change) -> str:
    """`better, 4.2 s.e.`."""
    return f"{change.verdict}, {change.errors_text('s.e.')}"


def documents(score: Score) -> str:
    return f"{score.num_documents:,}" if score.num_documents is not None else NONE


def how_scored(evaluations: Sequence[Evaluation], shots: str | None = None) -> str:
    """How the numbers of a table came about; `shots`: what to say of the examples in the prompt."""
    settings = dict.fromkeys(settings_text(found.settings, shots) for found in evaluations)
    seconds = [f"{e.label} {e.seconds:.0f}" for e in evaluations if e.seconds is not None]
    cached = [found.label for found in evaluations if found.cached]
    parts = [f"How: {' / '.join(settings)}.", "± is lm-eval's standard error over documents, not over seeds."]
    versions = {s.task: s.version for e in evaluations for s in e.scores if s.version is not None}
    if 0 < len(versions) <= MOST_ROWS:
        named = ", ".join(f"{task} {version}" for task, version in versions.items())
        parts.append(f"Versions of the tasks: {named}.")
    if seconds:
        parts.append(f"Seconds: {', '.join(seconds)}.")
    if cached:
        parts.append(f"Taken over from an earlier run with the same base and tasks: {', '.join(cached)}.")
    return " ".join(parts)


def settings_text(settings: Settings, shots: str | None = None) -> str:
    number = settings.num_fewshot
    own = "each task's own number of examples in the prompt" if number is None else f"{number}-shot"
    parts = [f"lm-eval {settings.lm_eval}" if settings.lm_eval else "lm-eval", shots or own]
    parts.append(f"the first {settings.limit} documents of a task" if settings.limit else "all documents")
    if settings.chat_template is not None:
        parts.append(f"chat template {'on' if settings.chat_template else 'off'}")
    if settings.format:
        parts.append(f"prompt format {settings.format}")
    if settings.seed is not None:
        parts.append(f"seed {settings.seed}")
    if settings.batch_size is not None:
        parts.append(f"batches of {settings.batch_size}")
    if settings.world_size is not None:
        parts.append(f"{settings.world_size} rank(s)" + (f", {settings.mode}" if settings.mode else ""))
    return ", ".join(parts)


def fewshot_section(evaluations: Evaluations) -> Section | None:
    """The untouched base with examples in its prompt, beside the tuned model."""
    if not evaluations.of("fewshot", "base"):
        return None
    columns = {f"base, {prompt}": found for prompt, found in evaluations.by_prompt().items()}
    if evaluations.after is not None:
        columns[f"tuned, {evaluations.after.prompt}"] = evaluations.after
    blocks: list[Block] = [Table(("task, metric", *columns), _rows(columns))]
    if rows := [_against(prompt, change) for prompt, change in best_prompts(evaluations)]:
        blocks.append(Table(("task, metric", "best prompt", "tuned over it", "verdict"), rows))
    how = how_scored(list(columns.values()), "as many examples in the prompt as the column says")
    blocks.append(Text(f"{how} {HOW_COMPARED}", is_small=True))
    return Section("Against prompting by hand", blocks)


def _rows(columns: dict[str, Evaluation]) -> list[tuple[str, ...]]:
    keys = {score.key: score.name for found in columns.values() for score in found.main_scores()}
    rows = []
    for key, name in keys.items():
        scores = [found.score(key) for found in columns.values()]
        rows.append((name, *(score.text if score else NONE for score in scores)))
    return rows


def best_prompts(evaluations: Evaluations) -> list[tuple[str, Change]]:
    """(prompt, base with it -> tuned) of the best prompt by hand of each task."""
    found = []
    for score in evaluations.after.main_scores() if evaluations.after else []:
        bases = [(prompt, base.score(score.key)) for prompt, base in evaluations.by_prompt().items()]
        bases = [(prompt, base) for prompt, base in bases if base is not None]
        sign = 1 if score.higher_is_better else -1
        if len(bases) > 1:
            prompt, best = max(bases, key=lambda pair: sign * pair[1].value)
            found.append((prompt, Change(best, score)))
    return found


def _against(prompt: str, change: Change) -> tuple[str, ...]:
    return change.after.name, f"{prompt}, {change.before.text}", change.text, verdict(change)


def format_section(evaluations: Evaluations) -> Section | None:
    """How far the score depends on the wording of the prompt, for the base and the tuned model."""
    rows = []
    for model in ("base", "tuned"):
        formats = evaluations.by_format(model)
        if len(formats) < 2:
            continue
        for score in list(formats.values())[-1].main_scores():
            scores = [s for each in formats.values() if (s := each.score(score.key)) is not None]
            is_share = all(s.is_share for s in scores)
            values = [s.value for s in scores]
            found = (min(values), median(values), max(values))
            texts = [in_text(value, None, is_share) for value in found]
            spread = in_text(max(values) - min(values), None, is_share, signed=True).removeprefix("+")
            rows.append((f"{score.name}, {model}", str(len(scores)), *texts, spread))
    if not rows:
        return None
    how = (
        "How: the same documents under prompts that mean the same and differ in wording and layout, the "
        "task's own among them. A small spread means that the score is the model's, not the prompt's."
    )
    headings = ("task, metric, model", "formats", "minimum", "median", "maximum", "spread")
    blocks: list[Block] = [Table(headings, sorted(rows)), Text(how, is_small=True)]
    blocks.append(Folded("each format", [_formats(evaluations)]))
    return Section("Other wordings of the prompt", blocks)


def _formats(evaluations: Evaluations) -> Table:
    """What each format is, with the scores in it."""
    models = {model: evaluations.by_format(model) for model in ("base", "tuned")}
    rows = []
    for number in sorted({number for formats in models.values() for number in formats}):
        found = {model: formats[number] for model, formats in models.items() if number in formats}
        what = next(iter(found.values())).settings.format_text or ("the task's own" if number == 0 else NONE)
        columns = [(f"{s.name}, {m}", s.text) for m, each in found.items() for s in each.main_scores()]
        rows += [(str(number), what, name, text) for name, text in columns]
    return Table(("format", "what it is", "task, metric, model", "score"), rows)


def forgetting_section(evaluations: Evaluations) -> Section | None:
    """Tasks that were not trained on, and the perplexity of general text."""
    before, after = evaluations.before, evaluations.after
    keys = [s.key for s in (after or before).main_scores("forgetting")] if after or before else []
    blocks: list[Block] = [_before_after(before, after, keys)] if keys else []
    texts = [found.perplexity for found in (before, after) if found and found.perplexity]
    if texts:
        old, new = before and before.perplexity, after and after.perplexity
        rows = [
            (f"{what} perplexity (lower is better)", *_from_to(old, new, f"{what}_perplexity"))
            for what in ("token", "byte")
        ]
        blocks.append(Table(("general text", "before", "after", "change"), rows))
        windows = f" in windows of {texts[0].window:,}" if texts[0].window else ""
        how = f"How: {texts[0].num_tokens:,} tokens of {texts[0].text}{windows}; no standard error is known."
        blocks.append(Text(how, is_small=True))
    return Section("What it forgot", blocks) if blocks else None


def _from_to(old: object, new: object, key: str) -> tuple[str, str, str]:
    values = [getattr(found, key) if found else None for found in (old, new)]
    texts = [f"{value:.4g}" if value is not None else NONE for value in values]
    change = f"{values[1] / values[0] - 1:+.1%}" if all(values) else NONE
    return texts[0], texts[1], change


def extra_section(evaluations: Evaluations) -> Section | None:
    """Scores that were asked for one by one."""
    extra = evaluations.of("extra")
    rows = [
        (f"{score.name}, {found.model}", found.label, documents(score), score.text)
        for found in extra
        for score in found.main_scores()
    ]
    if not rows:
        return None
    how = Text(how_scored(extra), is_small=True)
    return Section("Other scores", [Table(("task, metric, model", "label", "documents", "score"), rows), how])
