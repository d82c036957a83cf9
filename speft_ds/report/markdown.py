"""A report as GitHub's markdown. Whatever a file said is text in it: never markup, never HTML."""

from __future__ import annotations

import re
from functools import singledispatch

from speft_ds.report.document import (
    Block,
    Code,
    Document,
    Figures,
    Folded,
    Notes,
    Picture,
    Section,
    Table,
    Text,
)

PICTURES = "report"  # the folder of the pictures, beside the report
# An underscore inside a word marks nothing up: names of tasks stay legible.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)")


def to_markdown(document: Document) -> str:
    parts = [f"# {plain(document.title)}", *map(block_text, document.blocks)]
    for section in document.sections:
        parts += [_section_text(section)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text on one line that markdown shows as it is."""
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def _section_text(section: Section) -> str:
    return "\n\n".join([f"## {plain(section.title)}", *map(block_text, section.blocks)])


@singledispatch
def block_text(block: Block) -> str:
    """The markdown of one block."""
    raise TypeError(f"no block of a report: {block!r}")


@block_text.register
def _(block: Text) -> str:
    return f"<sub>{plain(block.text)}</sub>" if block.is_small else plain(block.text)


@block_text.register
def _(block: Notes) -> str:
    return "\n".join(f"> - {plain(line)}" for line in block.lines)


@block_text.register
def _(block: Figures) -> str:
    return block_text(Table(("", "", ""), block.figures))


@block_text.register
def _(block: Table) -> str:
    columns = range(len(block.headings))
    rule = ["---" if column == 0 else "---:" for column in columns]
    lines = [[plain(heading) or " " for heading in block.headings], rule]
    lines += [[plain(cell) for cell in row] for row in block.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@block_text.register
def _(block: Picture) -> str:
    return f"![{plain(block.alt)}]({PICTURES}/{block.file})"


@block_text.register
def _(block: Code) -> str:
    longest = max(map(len, re.findall("`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"


@block_text.register
def _(block: Folded) -> str:
    inner = "\n\n".join(map(block_text, block.blocks))
    return f"<details><summary>{plain(block.title)}</summary>\n\n{inner}\n\n</details>"
