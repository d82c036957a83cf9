"""Output to the terminal: what files and rows say is text there, in any encoding.

Imports no torch.
"""

import codecs
import io
import math
import sys
from collections.abc import Iterator

import rich.console
from rich.console import ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from speft_ds.untrusted import printable

ASCII = {"±": "+-", "→": "->", "✓": "ok", "✗": "X", "√": "sqrt", "²": "^2", "…": "..."}
_IN_ASCII = "speft_ds.ascii"  # an error handler's name


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(ASCII.get(letter, "?") for letter in letters), error.end


codecs.register_error(_IN_ASCII, _in_ascii)


def encodable(text: str, encoding: str | None = None) -> str:
    """The text as an encoding (None: that of stdout) can write it, with ASCII for what it lacks."""
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _IN_ASCII).decode(encoding)


def init_output() -> None:
    """Have stdout and stderr write what their encoding lacks as ASCII, where they would fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_IN_ASCII)


class Console(rich.console.Console):
    """Rich's console, which takes texts as they are, unless markup is asked for.

    No control character of theirs reaches the terminal, and no secret: texts are looked at before they are
    wrapped, which would divide one, and are made ASCII where they have to be, which changes their width.
    """

    def __init__(self, *, markup: bool = False, **options: object):
        super().__init__(markup=markup, emoji=False, **options)

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(self._shown(text), **options)

    def render(self, renderable: object, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        if isinstance(renderable, Text) and (safe := self._shown(renderable.plain)) != renderable.plain:
            renderable = renderable.blank_copy(safe)
        for segment in super().render(renderable, options):
            is_text = not segment.control and not segment.text.isspace()
            yield segment._replace(text=printable(segment.text)) if is_text else segment

    def _shown(self, text: str) -> str:
        return encodable(printable(text), self.encoding)


def duration(seconds: float) -> str:
    """`42 s`, `5 min 31 s`, `3 h 7 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
