"""What a report consists of, whether it becomes markdown or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph; small where it says how something was made."""

    text: str
    is_small: bool = False


@dataclass(frozen=True)
class Notes:
    """What the reader should know before anything else: missing files, damaged lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Figures:
    """The few numbers that matter most: (what, number, how it was made) each."""

    figures: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn already.

    Attributes:
        file: its name in the folder of pictures, .svg or .png.
        alt: what it shows, for who cannot see it.
        is_small: two of them fit beside each other.
    """

    file: str
    content: bytes
    alt: str
    is_small: bool = False


@dataclass(frozen=True)
class Code:
    """Commands or a file, word by word."""

    text: str
    language: str = "bash"


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for."""

    title: str
    blocks: Sequence[Block]


Block = Text | Notes | Figures | Table | Picture | Code | Folded


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section]

    def pictures(self) -> list[Picture]:
        """All of them, folded ones too."""
        return _pictures([*self.blocks, *(block for section in self.sections for block in section.blocks)])


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = [block for block in blocks if isinstance(block, Picture)]
    for block in blocks:
        if isinstance(block, Folded):
            found += _pictures(block.blocks)
    return found
