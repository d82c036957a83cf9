"""The search for a prompt on a few labelled rows: template, label words, choice and order of examples.

Greedy: every template, then every set of label words, then random examples, each kept where it is better on
the labelled rows; a row is never an example of its own. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TEXT, WORDS = "{text}", "{words}"  # in templates
TEMPLATES = (
    TEXT,
    f"{TEXT}\nAnswer:",
    f"Input: {TEXT}\nOutput:",
    f"Text: {TEXT}\nLabel:",
    f"{TEXT}\nThe answer is",
)
ASKING = tuple(f"Choose one of: {WORDS}.\n{template}" for template in TEMPLATES[1:4])  # with label words only
OF_TWO = (("no", "yes"), ("false", "true"), ("bad", "good"), ("negative", "positive"))


@dataclass(frozen=True)
class LabelledRow:
    """A document of a task, with its choices and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Prompt:
    """How a document is asked for.

    Attributes:
        words: in place of the task's choices; None: these.
        examples: rows to show before it, by number, in order.
    """

    template: str
    words: tuple[str, ...] | None
    examples: tuple[int, ...]

    def write(self, row: LabelledRow, rows: Sequence[LabelledRow], delimiter: str = " ") -> str:
        """The prompt for a row, which is not shown as an example of its own."""
        shown = [rows[number] for number in self.examples if rows[number] is not row]
        parts = [self._fill(each) + delimiter + self.answers(each)[each.label] for each in shown]
        return "\n\n".join([*parts, self._fill(row)])

    def answers(self, row: LabelledRow) -> tuple[str, ...]:
        return row.choices if self.words is None else self.words

    def _fill(self, row: LabelledRow) -> str:
        return self.template.replace(WORDS, ", ".join(self.answers(row))).replace(TEXT, row.text)


Quality = tuple[float, float]  # share of the rows that it answers right, then their mean log-likelihood


@dataclass(frozen=True)
class Found:
    """The best prompt, how good it is on the labelled rows, and what the search took."""

    prompt: Prompt
    quality: Quality
    num_prompts: int
    num_forwards: int  # answers that were scored


def search(
    rows: Sequence[LabelledRow],
    measure: Callable[[Prompt], Quality],
    max_forwards: int,
    num_examples: int,
    seed: int,
) -> Found:
    """The best prompt on some rows, the same for the same seed.

    Args:
        max_forwards: answers to score; the first prompt is measured in any case.
        num_examples: in a prompt, at most.
    """
    generator, cost = random.Random(seed), sum(len(row.choices) for row in rows)
    num_examples = min(num_examples, len(rows) - 1)
    seen: dict[Prompt, Quality] = {}

    def better(best: Prompt, other: Prompt) -> Prompt:
        if other not in seen and (len(seen) + 1) * cost <= max_forwards:
            seen[other] = measure(other)
        return other if other in seen and seen[other] > seen[best] else best

    first = tuple(generator.sample(range(len(rows)), num_examples))
    best = Prompt(TEMPLATES[0], None, first)
    seen[best] = measure(best)
    is_fixed = len({row.choices for row in rows}) == 1
    for template in TEMPLATES + (ASKING if is_fixed else ()):
        best = better(best, replace(best, template=template))
    for words in label_words(rows[0].choices) if is_fixed else ():
        best = better(best, replace(best, words=words))
    for _ in range(max_forwards // cost - len(seen)):
        size = generator.randint(0, num_examples)
        best = better(best, replace(best, examples=tuple(generator.sample(range(len(rows)), size))))
    return Found(best, seen[best], len(seen), len(seen) * cost)


def label_words(choices: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Words that could stand for a task's choices, besides these."""
    count = len(choices)
    letters, numbers = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count], range(1, count + 1)
    sets = [tuple(map(change, choices)) for change in (str.lower, str.capitalize, str.upper)]
    sets += [tuple(letters), tuple(map(str, numbers))]
    sets += [each[::step] for each in OF_TWO for step in (1, -1)]
    fits = [words for words in sets if len(set(words)) == count and words != choices]
    return list(dict.fromkeys(fits))
