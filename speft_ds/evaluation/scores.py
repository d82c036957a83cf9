"""The scores of a run, RUN/eval/*.json, and how two of them differ. The one module that knows these files."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from speft_ds.io import read_json

FOLDER = "eval"
CLEAR = 2.0  # standard errors from which on a difference counts as one

JobKind = Literal["main", "fewshot", "auto", "format", "extra"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Settings(_Part):
    """How a model was scored."""

    num_fewshot: int | None = None
    limit: int | float | None = None
    chat_template: bool | None = None
    seed: int | None = None
    format: int = 0
    format_text: str | None = None
    mode: str | None = None
    world_size: int | None = None
    batch_size: int | None = None
    weights: str | None = None  # the format of the linears' weights, simulated
    activations: str | None = None  # of their inputs
    lm_eval: str | None = None

    def in_words(self, but: Collection[str] = ()) -> str:
        """`limit 500, lm_eval 0.4.13`: those that are known, without the names in `but`."""
        known = self.model_dump(exclude={"format", "format_text", *but}, exclude_none=True)
        return ", ".join(f"{key} {value}" for key, value in known.items())


class Score(_Part):
    """One metric of one task."""

    task: str
    metric: str
    filter: str = "none"
    value: float
    stderr: float | None = None  # over documents, as lm-eval gives it
    num_documents: int | None = None
    num_fewshot: int | None = None  # examples in the prompt; None: not known
    version: int | float | str | None = None  # of the task
    higher_is_better: bool = True
    is_main: bool = True
    role: Literal["task", "forgetting"] = "task"
    is_group: bool = False
    group: str | None = None  # of tasks, that it is a part of

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.metric, self.filter

    @property
    def name(self) -> str:
        filtered = f" ({self.filter})" if self.filter not in ("", "none") else ""
        return f"{self.task} {self.metric}{filtered}"

    @property
    def is_share(self) -> bool:
        """Whether it reads best in percent: an accuracy does, a perplexity or a BLEU score does not."""
        return self.higher_is_better and 0.0 <= self.value <= 1.0

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.higher_is_better else -1

    def __str__(self) -> str:
        return in_text(self.value, self.stderr, self.is_share)

    @property
    def short(self) -> str:
        """Without its error."""
        return in_text(self.value, None, self.is_share)


class Perplexity(_Part):
    """Of the forgetting text."""

    text: str
    num_bytes: int | None = None
    num_tokens: int
    window: int | None = None  # tokens that a token is predicted from, at most
    token_perplexity: float
    byte_perplexity: float
    bits_per_byte: float | None = None

    def is_of_same_text(self, other: Perplexity) -> bool:
        """Whether the two can be compared: of a file of the same name, and as much of it."""
        files = [(Path(each.text).name, each.num_bytes, each.num_tokens) for each in (self, other)]
        return files[0] == files[1]


class ScoreFile(_Part):
    """One model, scored once on all tasks: a file of eval/."""

    label: str
    kind: JobKind
    model: Literal["base", "tuned"]
    asked: dict[str, Any] = {}  # what the scores depend on; see `results.asked`
    settings: Settings = Settings()
    scores: list[Score]
    perplexity: Perplexity | None = None
    auto_prompt: dict[str, Any] | None = None  # task -> the prompt that was found for it, and how
    seconds: float | None = None
    cached: bool = False  # whether every response came from the cache
    notes: list[str] = []

    def score(self, key: tuple[str, str, str]) -> Score | None:
        return next((score for score in self.scores if score.key == key), None)

    def main_scores(self, role: str = "task") -> list[Score]:
        """The main score of each task, or of a group of tasks in place of its parts."""
        return [s for s in self.scores if s.is_main and s.role == role and s.group is None]

    @property
    def num_fewshot(self) -> int | None:
        """Examples in the prompt; None: not the same number for all tasks."""
        numbers = {score.num_fewshot for score in self.scores} - {None} or {self.settings.num_fewshot}
        return numbers.pop() if len(numbers) == 1 else None

    @property
    def prompt(self) -> str:
        """`4-shot`, that each task has its own number of examples, or that a prompt was searched."""
        if self.kind == "auto":
            return "searched prompt"
        return "own prompts" if self.num_fewshot is None else f"{self.num_fewshot}-shot"


@dataclass(frozen=True)
class ScoreChange:
    """A score before and after."""

    before: Score
    after: Score

    @property
    def gain(self) -> float:
        """The difference, positive where it is better."""
        return self.after.sign * (self.after.value - self.before.value)

    @property
    def stderr(self) -> float | None:
        """Of the difference, as if the documents were different ones; None where one error is unknown."""
        errors = (self.before.stderr, self.after.stderr)
        return math.hypot(*errors) if all(map(_is_known, errors)) else None

    @property
    def num_errors(self) -> float | None:
        """The gain in standard errors; None where there is nothing to divide by."""
        return self.gain / self.stderr if self.stderr and math.isfinite(self.gain) else None

    @property
    def verdict(self) -> Literal["better", "worse", "no clear change"]:
        """What can be said of it; without a standard error, any difference counts."""
        if self.num_errors is None:
            is_clear = self.gain != 0 and math.isfinite(self.gain)
        else:
            is_clear = abs(self.num_errors) >= CLEAR
        if not is_clear:
            return "no clear change"
        return "better" if self.gain > 0 else "worse"

    def errors_text(self, unit: str = "standard errors") -> str:
        """How far apart they are: `2.4 standard errors`."""
        if self.num_errors is None:
            return "no standard error"
        return f"{abs(self.num_errors):.{1 if abs(self.num_errors) < 10 else 0}f} {unit}"

    @property
    def verdict_text(self) -> str:
        """`better, 4.2 s.e.`."""
        return f"{self.verdict}, {self.errors_text('s.e.')}"

    def __str__(self) -> str:
        return self._in_text(self.stderr)

    @property
    def short(self) -> str:
        """Without its error."""
        return self._in_text(None)

    def _in_text(self, stderr: float | None) -> str:
        is_share = self.before.is_share and self.after.is_share
        return in_text(self.after.value - self.before.value, stderr, is_share, signed=True)


def _is_known(error: float | None) -> bool:
    return error is not None and math.isfinite(error)


def in_text(value: float, stderr: float | None, is_share: bool, signed: bool = False) -> str:
    """`45.2% ± 1.1`, `1.8413 ± 0.0017`: a share in percent; else to two digits of the error, or with four."""
    sign = "+" if signed else ""
    if is_share:
        number = f"{100 * value:{sign}.1f}{' points' if signed else '%'}"
        return f"{number} ± {100 * stderr:.1f}" if _is_known(stderr) else number
    if not _is_known(stderr) or stderr <= 0:
        return f"{value:{sign}.4g}" + (" ± 0" if stderr == 0 else "")
    digits = min(9, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign}.{digits}f} ± {stderr:.{digits}f}"


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of a run."""

    all: list[ScoreFile]
    problems: list[str]  # one sentence per file that is left out

    def of(self, kind: JobKind, model: str | None = None) -> list[ScoreFile]:
        return [found for found in self.all if found.kind == kind and model in (None, found.model)]

    @property
    def before(self) -> ScoreFile | None:
        return next(iter(self.of("main", "base")), None)

    @property
    def after(self) -> ScoreFile | None:
        return next(iter(self.of("main", "tuned")), None)

    @property
    def last(self) -> ScoreFile | None:
        return self.after or self.before

    @property
    def notes(self) -> list[str]:
        """What happened in scoring, once for all files that say it: `before, after: task: 3 of 9 ...`."""
        labels: dict[str, list[str]] = {}
        for found in self.all:
            for note in found.notes:
                labels.setdefault(note, []).append(found.label)
        return [f"{', '.join(files)}: {note}" for note, files in labels.items()]

    @property
    def perplexities(self) -> tuple[Perplexity | None, Perplexity | None]:
        """Before and after; before is None, too, where it is of another text."""
        before, after = (each and each.perplexity for each in (self.before, self.after))
        is_other = before and after and not before.is_of_same_text(after)
        return None if is_other else before, after

    def both(self, score: Score) -> tuple[Score | None, Score | None]:
        """A score before and after; None where it was not made."""
        return tuple(each and each.score(score.key) for each in (self.before, self.after))

    def main_scores(self, role: str = "task") -> list[Score]:
        """Of the last evaluation."""
        return self.last.main_scores(role) if self.last else []

    def changes(self, role: str = "task") -> list[ScoreChange]:
        """The main scores that were made both before and after, the clearest change first."""
        pairs = [self.both(score) for score in self.main_scores(role)]
        changes = [ScoreChange(old, new) for old, new in pairs if old and new]
        return sorted(changes, key=lambda change: -abs(change.num_errors or 0.0))

    def by_prompt(self) -> dict[str, ScoreFile]:
        """Examples in the prompt, and documents where these are fewer -> the base with them, fewest first."""
        found = [*self.of("main", "base"), *self.of("fewshot", "base")]
        found.sort(key=lambda each: -1 if each.num_fewshot is None else each.num_fewshot)
        found += self.of("auto", "base")
        limit = self.before.settings.limit if self.before else None
        named = {}
        for each in found:
            own = each.settings.limit
            fewer = f"{each.prompt} on {own:.0%} of the documents" if own and own < 1 else None
            fewer = fewer or f"{each.prompt} on {own} documents"
            named[each.prompt if own in (None, limit) else fewer] = each
        return named

    def best_prompts(self) -> list[tuple[str, ScoreChange]]:
        """(prompt, base with it -> tuned) for the best of several prompts by hand, per task."""
        best = []
        for score in self.after.main_scores() if self.after else []:
            bases = [(prompt, base.score(score.key)) for prompt, base in self.by_prompt().items()]
            bases = [(prompt, base) for prompt, base in bases if base is not None]
            if len(bases) > 1:
                prompt, base = max(bases, key=lambda pair: score.sign * pair[1].value)
                best.append((prompt, ScoreChange(base, score)))
        return best

    def by_format(self, model: str) -> dict[int, ScoreFile]:
        """Number of the prompt's format -> the model with it; 0 is the task's own."""
        others = self.of("format", model)
        own = self.of("main", model) if others else []
        return {found.settings.format: found for found in [*own, *others]}


def read_evaluations(run: Path) -> Evaluations:
    """Read all scores of a run folder; what cannot be read becomes one of the `problems`."""
    found, problems = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            found.append(ScoreFile.model_validate(read_json(path)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            problems.append(f"{FOLDER}/{path.name} is not understood: {place}: {first['msg']}")
        except (OSError, ValueError) as error:
            problems.append(f"{FOLDER}/{path.name} cannot be read: {error}")
    return Evaluations(found, problems)


def card_scores(folder: Path) -> list[dict]:
    """Rows for the card of a run's adapter: the main scores, `before` and `after` as texts, None: not made.

    The `value` is that of after.
    """
    found = read_evaluations(folder)
    return [
        {
            "role": role,
            "task": new.task,
            "metric": new.name.removeprefix(f"{new.task} "),
            "documents": new.num_documents,
            "before": (old := found.both(new)[0]) and str(old),
            "after": str(new),
            "value": new.value,
            "num_fewshot": new.num_fewshot,
        }
        for role in ("task", "forgetting")
        for new in (found.after.main_scores(role) if found.after else [])
    ]
