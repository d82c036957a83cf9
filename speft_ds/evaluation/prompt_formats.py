"""Equivalent formats of one prompt, by which scores of one model differ.

Sclar et al., Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design (FormatSpread),
2024: descriptors ("Question: ") in another case, with another separator, fields on lines of their own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

DESCRIPTOR = re.compile(r"^([A-Z][A-Za-z]*(?: [A-Za-z]+){0,2}):(?=[ \n]|$)", re.MULTILINE)
CASES: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower)
SEPARATORS = (":", " :", "::", " -", " ->", ":\t", " |", ": :")
BREAKS = ("\n", "\n\n", "\n\t")
SEED = 0


@dataclass(frozen=True)
class PromptFormat:
    """One way to write the fields of a prompt.

    Attributes:
        case: applied to descriptors; separator: in the place of their colon; line_break: before them.
    """

    case: Callable[[str], str]
    separator: str
    line_break: str

    def rewrite_request(self, arguments: tuple) -> tuple:
        """A request of lm-eval in this format: its prompt, and what ends an answer, in both forms."""
        prompt, *more = arguments
        if more and isinstance(more[0], dict) and "until" in more[0]:
            until = more[0]["until"]
            until = [until] if isinstance(until, str) else list(until)
            written = [self.rewrite(text) for text in until]
            more[0] = {**more[0], "until": list(dict.fromkeys([*until, *written]))}
        return self.rewrite(prompt), *more

    def rewrite(self, prompt: str) -> str:
        """The prompt in this format; one without descriptors at the start of a line stays as it is."""
        written = DESCRIPTOR.sub(lambda found: self.case(found[1]) + self.separator, prompt)
        if self.line_break == "\n":
            return written
        starts = [found.start() for found in DESCRIPTOR.finditer(prompt)]
        if not starts:
            return prompt
        return re.sub(rf"\n(?={self._any_descriptor(prompt)})", self.line_break, written)

    def _any_descriptor(self, prompt: str) -> str:
        names = {self.case(found[1]) + self.separator for found in DESCRIPTOR.finditer(prompt)}
        return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))

    def __str__(self) -> str:
        return repr(self.line_break + self.case("Question") + self.separator)[1:-1]


def prompt_formats(count: int) -> list[PromptFormat | None]:
    """The first `count` formats of an order that is the same for every run; the task's own (None) first."""
    ways = [PromptFormat(c, s, b) for c in CASES for s in SEPARATORS for b in BREAKS]
    ways.remove(PromptFormat(str, ":", "\n"))
    random.Random(SEED).shuffle(ways)
    return [None, *ways[: count - 1]]
