"""Documents that evaluation kept, RUN/eval/<label>/<task>.jsonl: what was asked and answered.

Whatever these files hold, few texts of limited length come out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speft_ds.evaluation.scores import FOLDER, Evaluations, Score, ScoreFile
from speft_ds.io import parse_json
from speft_ds.untrusted import path_within

MAX_LINE, MAX_BYTES, MAX_LINES = 2**20, 2**28, 100_000  # of a line, and of all files; the rest is left out
MAX_TEXT = 400  # characters
MAX_SHOWN = {"better": 2, "worse": 2, "same": 1}  # documents per task


@dataclass(frozen=True)
class Answer:
    """What a model made of a document."""

    document: int
    prompt: str  # its end
    expected: str
    answer: str
    value: float  # of the metric
    identity: Any  # of the document


@dataclass
class TaskAnswers:
    """A task's documents that were answered both before and after."""

    name: str  # of the task's main score
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MAX_SHOWN, 0))
    shown: list[tuple[str, Answer, Answer]] = field(default_factory=list)  # kind, before, after
    is_right_or_wrong: bool = True  # whether every value is 0 or 1

    @property
    def num_changed(self) -> int:
        return self.counts["better"] + self.counts["worse"]

    def add(self, before: Answer, after: Answer, sign: int) -> None:
        """Count a document; keep it where there is room. `sign`: of the score."""
        gain = sign * (after.value - before.value)
        kind = "better" if gain > 0 else "worse" if gain < 0 else "same"
        if self.counts[kind] < MAX_SHOWN[kind]:
            self.shown.append((kind, before, after))
            self.shown.sort(key=lambda each: list(MAX_SHOWN).index(each[0]))
        self.counts[kind] += 1
        self.is_right_or_wrong &= {before.value, after.value} <= {0.0, 1.0}


def read_answers(run: Path, found: Evaluations) -> tuple[list[TaskAnswers], list[str]]:
    """The tasks of a run whose documents can be compared, most changes first; the names of the others."""
    if not (found.before and found.after):
        return [], []
    tasks, others, reader = [], [], _Reader(run)
    for score in found.after.scores:
        if not score.is_main or score.is_group or not found.before.score(score.key):
            continue
        before = {answer.document: answer for answer in _answers(reader, found.before, score)}
        task = TaskAnswers(score.name)
        for after in _answers(reader, found.after, score):
            old = before.pop(after.document, None)
            if old and old.identity == after.identity:
                task.add(old, after, score.sign)
        (tasks if sum(task.counts.values()) else others).append(task)
    return sorted(tasks, key=lambda task: -task.num_changed), [task.name for task in others]


class _Reader:
    """The lines of the files of a run that can be read, as long as there are not too many."""

    def __init__(self, run: Path):
        self.run, self.num_bytes, self.num_lines = run, 0, 0

    def rows(self, label: str, task: str) -> Iterator[Mapping]:
        try:
            path = path_within(path_within(self.run / FOLDER, label), f"{task}.jsonl")
            if not path.is_file():  # a pipe would keep us waiting
                return
            with path.open("rb") as file:
                while self.num_bytes < MAX_BYTES and self.num_lines < MAX_LINES:
                    if not (line := file.readline(MAX_LINE)):
                        return
                    self.num_bytes, self.num_lines = self.num_bytes + len(line), self.num_lines + 1
                    with suppress(ValueError):  # also the parts of a line that is too long
                        row = parse_json(line)
                        if isinstance(row, Mapping):
                            yield row
        except (OSError, ValueError):
            return


def _answers(reader: _Reader, file: ScoreFile, score: Score) -> Iterator[Answer]:
    """The documents of a task; those without a number of their own for the score are left out."""
    for row in reader.rows(file.label, score.task):
        value, document = row.get(score.metric), row.get("doc_id")
        is_of_score = row.get("filter", score.filter) == score.filter and type(document) is int
        if is_of_score and isinstance(value, int | float) and abs(value) < 1e300:
            yield Answer(document, *_texts(row), float(value), row.get("doc_hash"))


def _texts(row: Mapping) -> tuple[str, str, str]:
    """Prompt, expected answer, answer. Of choices, the answer is the likeliest."""
    requests = [each for each in _list(row.get("arguments")) if isinstance(each, list) and each]
    responses = [_first(each) for each in _list(row.get("resps"))]
    prompt = requests[0][0] if requests else ""
    choices = [each[1] for each in requests if len(each) > 1 and isinstance(each[1], str)]
    expected, answer = row.get("target"), responses[0] if responses else ""
    if choices and len(choices) == len(responses) and all(map(_is_likelihood, responses)):
        answer = choices[max(range(len(choices)), key=lambda number: responses[number][0])]
        if type(expected) is int and 0 <= expected < len(choices):
            expected = choices[expected]
    prompt = str(prompt)
    prompt = prompt if len(prompt) <= MAX_TEXT else f"… {prompt[-MAX_TEXT:]}"
    return prompt.strip(), _cut(str(expected)), _cut(str(answer))


def _cut(text: str) -> str:
    return (text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …").strip()


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _first(value: object) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _is_likelihood(response: object) -> bool:
    return isinstance(response, list) and len(response) > 0 and type(response[0]) in (int, float)
