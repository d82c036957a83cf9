"""What comes out of files, rows and the environment, made safe to open, to print and to show."""

import os
import re
import signal
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_NAME, MAX_PARTS = 255, 8  # bytes of a part of a path, and its parts
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # environment variables
MIN_TOKEN = 8  # characters: a shorter value is none, and would be found inside of words
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")  # of a URL: user:password@
_HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_FOLDERS = re.compile(r"(?<![\w.:/])(?:~[\w.-]*)?/(?:[^/'\",:=\]}]+/)+")  # above what a path names
_KEPT = "\n\t\u200c\u200d"  # besides what is printable: the joiners of scripts and of emoji
# An underscore inside a word marks nothing up: names of tasks stay legible.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)")


def path_within(folder: Path, name: object, subfolders: bool = False) -> Path:
    """The path of a file that another file names: in `folder`, or below it where there may be `subfolders`.

    Only the name is looked at. Every file name that was read from JSON, YAML or a header goes through here
    before anything is opened or written.

    Raises:
        ValueError: it is no plain relative name of a file.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not all(map(_is_plain, parts)) or not 1 <= len(parts) <= (MAX_PARTS if subfolders else 1):
        raise ValueError(f"not the name of a file in this folder: {name!r:.100}")
    return folder.joinpath(*parts)


def _is_plain(name: str) -> bool:
    is_visible = name.isprintable() and name != "" and name[0] not in ".-~"
    return is_visible and "\\" not in name and len(name.encode()) <= MAX_NAME


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes more CPU time; only on the main thread, which gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def without_secrets(text: str) -> str:
    """A text without passwords of URLs, hub tokens and the tokens that this process has."""
    text = _HUB_TOKEN.sub("***", _CREDENTIALS.sub("", text) if "://" in text else text)
    for token in filter(None, map(os.environ.get, TOKEN_VARIABLES)):
        text = text.replace(token, "***") if len(token) >= MIN_TOKEN else text
    return text


def without_folders(word: str) -> str:
    """A word of a command line in which paths from / or ~ say nothing of this machine: `.../rows.jsonl`."""
    return _FOLDERS.sub(".../", word)


def printable(text: object) -> str:
    """A text as a terminal may have it: without control characters but line breaks, and without secrets."""
    text = without_secrets(str(text))
    if text.isprintable():
        return text
    return "".join(letter if _is_printable(letter) else "\ufffd" for letter in text)


def _is_printable(letter: str) -> bool:
    return letter.isprintable() or letter in _KEPT or unicodedata.category(letter) == "Zs"


def in_markdown(value: object) -> str:
    """A value on one line, as markdown shows it unchanged."""
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(printable(value).split()))
