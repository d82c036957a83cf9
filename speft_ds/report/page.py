"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from functools import singledispatch
from html import escape
from pathlib import Path

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

STYLE = Path(__file__).with_name("page.css")
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
DOTS = 150 / 96  # of a PNG a pixel of the page
VERDICTS = {"better": "better", "worse": "worse"}  # cells that are coloured
# The page loads nothing, whatever slipped into it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def to_html(document: Document) -> str:
    """The page; whatever a file said is text in it."""
    links = [f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in document.sections]
    body = [
        f"<header><h1>{escape(document.title)}</h1></header>",
        *map(block_html, document.blocks),
        f"<nav>{' '.join(links)}</nav>",
        *map(_section_html, document.sections),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(document.title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())


def _section_html(section: Section) -> str:
    inner = "\n".join(map(block_html, section.blocks))
    return f'<section id="{_anchor(section)}"><h2>{escape(section.title)}</h2>\n{inner}\n</section>'


@singledispatch
def block_html(block: Block) -> str:
    """The HTML of one block."""
    raise TypeError(f"no block of a report: {block!r}")


@block_html.register
def _(block: Text) -> str:
    return f"<p{' class=small' if block.is_small else ''}>{escape(block.text)}</p>"


@block_html.register
def _(block: Notes) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in block.lines)
    return f'<ul class="notes">{items}</ul>'


@block_html.register
def _(block: Figures) -> str:
    tiles = [
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd><dd class=small>{escape(how)}</dd></div>"
        for what, number, how in block.figures
    ]
    return f'<dl class="figures">{"".join(tiles)}</dl>'


@block_html.register
def _(block: Table) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in block.headings)
    rows = []
    for row in block.rows:
        name = f'<th scope="row">{escape(row[0])}</th>'
        cells = [f"<td{_verdict(cell)}>{_cell(cell)}</td>" for cell in row[1:]]
        rows.append(f"<tr>{name}{''.join(cells)}</tr>")
    body = "\n".join(rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    # Wide tables scroll by themselves; the keyboard reaches them.
    return f'<div class="wide" tabindex="0">{table}</div>'


def _cell(text: str) -> str:
    """A value stays on one line with its error."""
    return escape(text).replace(" ± ", "&nbsp;±&nbsp;")


def _verdict(cell: str) -> str:
    kind = VERDICTS.get(cell.partition(",")[0])
    return f' class="{kind}"' if kind else ""


@block_html.register
def _(block: Picture) -> str:
    kind = KINDS[Path(block.file).suffix]
    data = b64encode(block.content).decode()
    look = f'class="{"half" if block.is_small else "full"}"'
    if kind == "image/png":  # in its own size: its first chunk begins with the width in pixels
        look = f'width="{int.from_bytes(block.content[16:20]) / DOTS:.0f}"'
    return f'<img {look} src="data:{kind};base64,{data}" alt="{escape(block.alt)}">'


@block_html.register
def _(block: Code) -> str:
    return f'<pre tabindex="0"><code>{escape(block.text.rstrip())}</code></pre>'


@block_html.register
def _(block: Folded) -> str:
    inner = "\n".join(map(block_html, block.blocks))
    return f"<details><summary>{escape(block.title)}</summary>\n{inner}\n</details>"
