"""Equivalent formats of a prompt: how much a model's scores depend on wording alone.

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
    """How the fields of a prompt are written.

    Attributes:
        case: of descriptors; separator: in place of their colon; line_break: before them.
    """

    case: Callable[[str], str]
    separator: str
    line_break: str

    def rewrite_request(self, arguments: tuple) -> tuple:
        """An lm-eval request in this format: its prompt, and the strings that end an answer in both forms."""
        prompt, *more = arguments
        if more and isinstance(more[0], dict) and "until" in more[0]:
            until = more[0]["until"]
            until = [until] if isinstance(until, str) else list(until)
            both = dict.fromkeys([*until, *map(self.rewrite, until)])
            more[0] = {**more[0], "until": list(both)}
        return self.rewrite(prompt), *more

    def rewrite(self, prompt: str) -> str:
        """The prompt in this format; unchanged where no line starts with a descriptor."""
        rewritten = DESCRIPTOR.sub(self._descriptor, prompt)
        names = sorted(
            {self._descriptor(found) for found in DESCRIPTOR.finditer(prompt)}, key=len, reverse=True
        )
        if not names:
            return prompt
        return re.sub(rf"\n(?={'|'.join(map(re.escape, names))})", self.line_break, rewritten)

    def _descriptor(self, found: re.Match[str]) -> str:
        return self.case(found[1]) + self.separator

    def __str__(self) -> str:
        return repr(self.line_break + self.case("Question") + self.separator)[1:-1]


def prompt_formats(count: int) -> list[PromptFormat | None]:
    """The first `count` formats in an order that is the same for every run; first the task's own (None)."""
    formats = [PromptFormat(c, s, b) for c in CASES for s in SEPARATORS for b in BREAKS]
    formats.remove(PromptFormat(str, ":", "\n"))
    random.Random(SEED).shuffle(formats)
    return [None, *formats[: count - 1]]
