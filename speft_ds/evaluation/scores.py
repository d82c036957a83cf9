"""The scores of a run: RUN/eval/*.json, and how two of them differ. The one module that reads these files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

FOLDER = "eval"
CLEAR = 2.0  # standard errors from which on a difference is called one


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Settings(_Part):
    """How a model was scored, as far as the file says."""

    num_fewshot: int | None = None
    limit: int | float | None = None
    chat_template: bool | None = None
    seed: int | None = None
    format: int = 0
    format_text: str | None = None
    mode: str | None = None
    world_size: int | None = None
    batch_size: int | None = None
    lm_eval: str | None = None


class Score(_Part):
    """One metric of one task.

    Attributes:
        stderr: over documents, as lm-eval gives it.
        num_fewshot: examples in the prompt; None: not known.
        version: of the task.
        group: of tasks, that it is a part of.
    """

    task: str
    metric: str
    filter: str = "none"
    value: float
    stderr: float | None = None
    num_documents: int | None = None
    num_fewshot: int | None = None
    version: int | float | str | None = None
    higher_is_better: bool = True
    is_main: bool = True
    role: Literal["task", "forgetting"] = "task"
    is_group: bool = False
    group: str | None = None

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
    def short_text(self) -> str:
        """Without its error."""
        return in_text(self.value, None, self.is_share)

    @property
    def text(self) -> str:
        return in_text(self.value, self.stderr, self.is_share)


class Perplexity(_Part):
    """Of the forgetting text; `window`: tokens that a token is predicted from, at most."""

    text: str
    num_bytes: int | None = None
    num_tokens: int
    window: int | None = None
    token_perplexity: float
    byte_perplexity: float
    bits_per_byte: float | None = None


class Evaluation(_Part):
    """One model, scored once on all tasks: the contents of a file of eval/.

    Attributes:
        asked: what the scores depend on; see `results.asked`.
        cached: whether every response came from the cache.
    """

    label: str
    kind: Literal["main", "fewshot", "format", "extra"]
    model: Literal["base", "tuned"]
    asked: dict[str, Any] = {}
    settings: Settings = Settings()
    scores: list[Score]
    perplexity: Perplexity | None = None
    seconds: float | None = None
    cached: bool = False
    notes: list[str] = []

    def score(self, key: tuple[str, str, str]) -> Score | None:
        return next((score for score in self.scores if score.key == key), None)

    def main_scores(self, role: str = "task") -> list[Score]:
        """The main score of each task, or of a group of tasks in place of its parts."""
        return [s for s in self.scores if s.is_main and s.role == role and s.group is None]

    @property
    def num_fewshot(self) -> int | None:
        """Examples in the prompt; None: not one number for all tasks."""
        numbers = {score.num_fewshot for score in self.scores} - {None}
        if not numbers:
            return self.settings.num_fewshot
        return numbers.pop() if len(numbers) == 1 else None

    @property
    def prompt(self) -> str:
        """`4-shot`, or that each task has its own number of examples."""
        return "own prompts" if self.num_fewshot is None else f"{self.num_fewshot}-shot"


@dataclass(frozen=True)
class Change:
    """A score before and after.

    Attributes:
        stderr: of the difference, as if both were of other documents; None where one is not known.
    """

    before: Score
    after: Score

    @property
    def difference(self) -> float:
        return self.after.value - self.before.value

    @property
    def stderr(self) -> float | None:
        return difference_stderr(self.before.stderr, self.after.stderr)

    @property
    def num_errors(self) -> float | None:
        """The difference in standard errors; positive is better. None where there is nothing to divide by."""
        if not self.stderr or not math.isfinite(self.difference):
            return None
        return (self.difference if self.after.higher_is_better else -self.difference) / self.stderr

    def errors_text(self, unit: str = "standard errors") -> str:
        """How far apart they are: `2.4 standard errors`."""
        if self.num_errors is None:
            return "no standard error"
        return f"{abs(self.num_errors):.{1 if abs(self.num_errors) < 10 else 0}f} {unit}"

    @property
    def verdict(self) -> Literal["better", "worse", "no clear change"]:
        """What can be said of it; without a standard error, any difference counts."""
        if self.num_errors is not None:
            clear, gain = abs(self.num_errors) >= CLEAR, self.num_errors
        else:
            gain = self.difference if self.after.higher_is_better else -self.difference
            clear = gain != 0 and math.isfinite(gain)
        if not clear:
            return "no clear change"
        return "better" if gain > 0 else "worse"

    @property
    def is_share(self) -> bool:
        return self.before.is_share and self.after.is_share

    @property
    def short_text(self) -> str:
        """Without its error."""
        return in_text(self.difference, None, self.is_share, signed=True)

    @property
    def text(self) -> str:
        return in_text(self.difference, self.stderr, self.is_share, signed=True)


def difference_stderr(*errors: float | None) -> float | None:
    """The standard error of a difference of independent values; None where one is not known."""
    if any(error is None or not math.isfinite(error) for error in errors):
        return None
    return math.sqrt(sum(error**2 for error in errors))


def in_text(value: float, stderr: float | None, is_share: bool, signed: bool = False) -> str:
    """`45.2% ± 1.1`: a share in percent, anything else with the digits that its error leaves."""
    sign = "+" if signed else ""
    if is_share:
        error = f" ± {100 * stderr:.1f}" if stderr is not None and math.isfinite(stderr) else ""
        unit = " points" if signed else "%"
        return f"{100 * value:{sign}.1f}{unit}{error}"
    error = f" ± {stderr:.2g}" if stderr is not None and math.isfinite(stderr) else ""
    return f"{value:{sign}.4g}{error}"


def changes(before: Evaluation | None, after: Evaluation | None, role: str = "task") -> list[Change]:
    """The main scores that both have."""
    if before is None or after is None:
        return []
    pairs = [(before.score(score.key), score) for score in after.main_scores(role)]
    return [Change(old, new) for old, new in pairs if old is not None]


@dataclass(frozen=True)
class Evaluations:
    """All of a run.

    Attributes:
        problems: of files that are left out, in words.
    """

    all: list[Evaluation]
    problems: list[str]

    def of(self, kind: str, model: str | None = None) -> list[Evaluation]:
        return [found for found in self.all if found.kind == kind and model in (None, found.model)]

    @property
    def before(self) -> Evaluation | None:
        return next(iter(self.of("main", "base")), None)

    @property
    def after(self) -> Evaluation | None:
        return next(iter(self.of("main", "tuned")), None)

    def by_prompt(self) -> dict[str, Evaluation]:
        """How many examples are in the prompt -> the base with them, fewest first."""
        found = [*self.of("main", "base"), *self.of("fewshot", "base")]
        found.sort(key=lambda each: -1 if each.num_fewshot is None else each.num_fewshot)
        return {each.prompt: each for each in found}

    def by_format(self, model: str) -> dict[int, Evaluation]:
        """Number of the prompt's format -> the model under it; 0 is the task's own."""
        others = self.of("format", model)
        own = self.of("main", model) if others else []
        return {found.settings.format: found for found in [*own, *others]}


def read_evaluations(run: Path) -> Evaluations:
    """Read all scores of a run folder; what cannot be read is said in `problems`."""
    found, problems = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(document, dict) and "results" in document and "scores" not in document:
                problems.append(f"{FOLDER}/{path.name} was scored by an older version: score the run again")
                continue
            found.append(Evaluation.model_validate(document))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            problems.append(f"{FOLDER}/{path.name} is not understood: {place}: {first['msg']}")
        except (OSError, ValueError) as error:
            problems.append(f"{FOLDER}/{path.name} cannot be read: {error}")
    return Evaluations(found, problems)


def card_scores(folder: Path) -> list[dict]:
    """Rows for the card of a run's adapter: the main scores, before and after."""
    found = read_evaluations(folder)
    before, after, rows = found.before, found.after, []
    for score in after.main_scores() if after else []:
        old = before.score(score.key) if before else None
        row = {"task": score.task, "metric": score.metric, "after": score.value, "stderr": score.stderr}
        rows.append({**row, "before": old.value if old else None})
    return rows
