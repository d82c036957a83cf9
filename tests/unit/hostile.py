"""Hostile files for tests: values that nobody expects, changes of texts and documents, and what is opened."""

import contextlib
import os
import sys
import time
from pathlib import Path

NUM_HOSTILE = int(os.environ.get("SPEFT_NUM_HOSTILE", "1000"))  # files of a kind
MAX_CPU_S = 2.0  # that reading one of them may take: more is a hang

NAMES = [
    "../outside.safetensors",
    "../../outside.safetensors",
    "a/../../outside.safetensors",
    "/etc/passwd",
    "//etc/passwd",
    "~/outside",
    ".",
    "..",
    "",
    "./x",
    "a//b",
    "a/",
    ".hidden",
    "-rf",
    "a\\..\\b",
    "x" * 256,
    "ä" * 200,
    "a/" * 100 + "x",
    "x\0y",
    "x\ny",
    "\x1b[2J",
    "\u202egnp.exe",
    "\ud800",
    "C:\\x",
    "file:///etc/passwd",
]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    [None],
    {"a": []},
]
WRONG = [*VALUES, *NAMES, "x" * 10_000, [1] * 1000]


def changed(document, chance):
    """A JSON document in which a value at any depth is another one, is gone, or is there twice."""
    if isinstance(document, dict) and document and chance.random() < 0.8:
        key = chance.choice(sorted(document))
        rest = {name: value for name, value in document.items() if name != key}
        if chance.random() < 0.1:
            return rest
        return rest | {key: changed(document[key], chance)}
    if isinstance(document, list) and document and chance.random() < 0.8:
        position = chance.randrange(len(document))
        how = chance.random()
        if how < 0.15:
            return document[:position] + document[position + 1 :]
        if how < 0.3:
            return [*document, document[position]]
        return [*document[:position], changed(document[position], chance), *document[position + 1 :]]
    return chance.choice(WRONG)


def mangled(text, chance, pieces):
    """A text with a few pieces put in, and a few parts of it repeated, swapped or cut out."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(text) + 1)
        stop = min(len(text), start + chance.randint(0, 40))
        how = chance.randrange(4)
        if how == 0:
            text = text[:start] + chance.choice(pieces) + text[start:]
        elif how == 1:
            text = text[:start] + text[stop:]
        elif how == 2:
            text = text[:stop] + text[start:stop] * chance.choice([1, 2, 50]) + text[stop:]
        else:
            text = text[:start] + chance.choice(pieces) + text[stop:]
    return text


@contextlib.contextmanager
def no_hang():
    """Fail where the block takes more than MAX_CPU_S of this process' time."""
    before = time.process_time()
    yield
    assert time.process_time() - before < MAX_CPU_S


_opened = None  # while `only_opens` watches: real paths


def _audit(event, arguments):
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append((os.path.realpath(os.fsdecode(arguments[0])), arguments[1]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def only_opens(folder):
    """Fail where the block opens a file outside of a folder, but for Python's own and the machine's."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    ours = Path(folder).resolve()
    fine = (ours, Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[2] / "speft_ds")
    fine += (Path("/proc"), Path("/dev/null"), Path("/dev/urandom"))
    odd = [path for path, _ in opened if not any(Path(path).is_relative_to(place) for place in fine)]
    assert not odd, odd[:5]
