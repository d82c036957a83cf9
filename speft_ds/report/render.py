"""Reports as one HTML page and as markdown, by templates. What a file says is text in both, never markup."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from speft_ds.errors import UserError
from speft_ds.io import write_bytes
from speft_ds.report.tables import in_bytes
from speft_ds.terminal import duration
from speft_ds.untrusted import in_markdown, printable

PAGE, MARKDOWN = "report.html", "report.md"
PICTURES = "report"  # the folder of the pictures, beside the report
TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn already, as SVG."""

    content: bytes
    alt: str  # what it shows, for readers who cannot see it
    is_small: bool = False  # two of them fit beside each other

    @property
    def width(self) -> int:
        """Of its own, in pixels: it is shown a little larger, or narrower where there is little room."""
        points = re.search(rb'<svg[^>]* width="([\d.]+)pt"', self.content)
        return round(float(points[1]) * 4 / 3) if points else 0

    @property
    def address(self) -> str:
        """All of it, as an address."""
        return f"data:image/svg+xml;base64,{b64encode(self.content).decode()}"


def write_pages(folder: Path, content: str, pictures: dict[str, Picture], **facts: Any) -> list[Path]:
    """Write pictures (by file name), report.html and report.md, each file complete or not at all.

    Args:
        content: `run` or `comparison`: CONTENT.j2 has the sections, CONTENT_verdict.j2 what they come to.
        facts: what else the templates show.
    Returns:
        The page and the markdown.
    Raises:
        UserError: they cannot be written.
    """
    files = {folder / PICTURES / name: picture.content for name, picture in pictures.items()}
    for name in (PAGE, MARKDOWN):
        files[folder / name] = render(name, content, pictures=pictures, **facts).encode(errors="replace")
    try:
        for path, written in files.items():
            write_bytes(path, written)
    except OSError as error:
        fix = "free space, or name another folder: --output FOLDER"
        raise UserError(f"the report cannot be written: {error}", str(folder), fix) from error
    return [folder / PAGE, folder / MARKDOWN]


def render(name: str, content: str, **facts: Any) -> str:
    """The text of report.html or report.md."""
    template = _environment(name == MARKDOWN).get_template(name)
    return template.render(content=content, titles=[], **facts)


@cache
def _environment(is_markdown: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=_as_markdown if is_markdown else shown,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {
        "one_line": lambda text: Markup(" ".join(text.split())),
        "bytes": in_bytes,
        "amounts": lambda sizes: [(what, in_bytes(size)) for what, size in sizes.items() if size],
        "duration": duration,
    }
    return environment


def shown(value: Any) -> Any:
    """Numbers as people read them, and a dash for what is not known."""
    if value is None:
        return "-"
    if type(value) is int:
        return f"{value:,}"
    if type(value) is str:
        return printable(value)
    return f"{value:.4g}" if type(value) is float else value


def _as_markdown(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(in_markdown(shown(value)))
