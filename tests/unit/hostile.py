"""Hostile files for tests: values that nobody expects, changes of texts and documents, and what is opened."""

import contextlib
import json
import os
import struct
import sys
import time
import unicodedata
from pathlib import Path

from speft_ds.errors import UserError

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
JSON_PIECES = ["[" * 100_000, '{"a":' * 10_000, "9" * 10_000, "-Infinity", "NaN", "1e999", "1e-999"]
JSON_PIECES += ['"\\ud800"', '"\\u0000"', "\0", "\ufeff", "'", "//", ",", '"a": 1,', "\x1b[2J", "tru"]
NUMBERS = [0, 1, 7, -1, 2**20, 2**31, 2**32, 2**63, 2**64 - 1, 10**30, 0.5]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64", "C64"]
DTYPES += ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F128", "f32", ""]


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


def json_text(document, chance):
    """A document as JSON; one in ten is cut off, or has something in it that is none."""
    text, how = json.dumps(document), chance.random()
    if how < 0.05:
        return text[: chance.randrange(len(text))]
    return mangled(text, chance, JSON_PIECES) if how < 0.1 else text


def hostile_tensors(content, chance):
    """A safetensors file with another header: lengths, offsets, shapes, dtypes, names, metadata."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    one, other = chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
    part, how, more = header[one], chance.randrange(10), ""
    if how == 0:
        part["data_offsets"] = [chance.choice([*NUMBERS, *part["data_offsets"]]) for _ in range(2)]
    elif how == 1:
        part["data_offsets"] = header[other]["data_offsets"]  # both of the same bytes, and a hole
    elif how == 2:
        part["shape"] = chance.choice([changed(part["shape"], chance), [1, *part["shape"]], [0], NUMBERS[:2]])
    elif how == 3:
        part["dtype"] = chance.choice(DTYPES)
    elif how == 4:
        header[chance.choice([*NAMES, f"{one}.x", one.rpartition(".")[0]])] = header.pop(one)
    elif how == 5:
        header[one], header[other] = header[other], header[one]
    elif how == 6:
        more = "," + json.dumps({one: header[other]})[1:-1]  # a name that is there twice
    elif how == 7:
        header["__metadata__"] = chance.choice([*WRONG, changed(header.get("__metadata__", {}), chance)])
    elif how == 8:
        header = changed(header, chance)
    else:  # bytes of tensors
        start = chance.randrange(len(data))
        return content[: 8 + size] + data[:start] + chance.randbytes(len(data) - start)
    text = (json_text(header, chance)[:-1] + more + "}").encode(errors="surrogatepass")
    length = chance.choice(NUMBERS) if chance.random() < 0.1 else len(text)
    data = chance.choice([data] * 8 + [data[:-1], data + b"\0", b""])
    return struct.pack("<Q", int(length) % 2**64) + text + data


def in_place_of(path):
    """One after the other: what is no file stands there, or nothing does, and at last the file."""
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    makers = [lambda: None, path.mkdir, lambda: os.mkfifo(path)]  # a pipe that nobody writes to
    makers += [lambda to=to: path.symlink_to(to) for to in ("nowhere", path.name, "/dev/zero", "..", ".")]
    for make in makers:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        make()
        yield path
    path.unlink()
    if aside.exists():
        aside.rename(path)


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


def refusal(action):
    """The UserError that an action raises, whose text a terminal can show; None: it raises none."""
    try:
        action()
    except UserError as error:
        text = str(error)
        controls = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")}
        assert text.encode() and controls <= {"\n", "\t"}
        return error
    return None
