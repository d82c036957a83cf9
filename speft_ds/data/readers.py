"""Readers: training rows as they stand in a file. Imports no torch.

The standard library and pyarrow read them, so that an error names the line.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from speft_ds import hub
from speft_ds.data.bad_rows import BadRows, report
from speft_ds.errors import UserError
from speft_ds.io import decode_json, parse_json, sha256_of

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
Located = Iterator[tuple[str, Any]]  # where a row stands, and the row


class WrittenFloat(float):
    """A number of a JSON file that is no integer; as text it stays as it is written: 1.50, 1e3."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class NamedClass(int):
    """A number of a ClassLabel column, whose classes have these names; as text it is its own name."""

    def __new__(cls, number: int, names: list[str]):
        self = super().__new__(cls, number)
        self.names = names
        return self

    def __str__(self) -> str:
        return self.names[self]


def kind_of(path: str | Path) -> str | None:
    """The format of a file of rows by its name, compression aside: one of SUFFIXES, or None."""
    name = Path(path)
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
    return name.suffix if name.suffix in SUFFIXES else None


def iterate_file(path: Path, bad: BadRows | None = None) -> Located:
    """The rows of a file: .jsonl (one object per line), .json (a list), .csv, .tsv (with a header), .parquet.

    Each may be compressed (.gz, .zst); parquet compresses itself. A .csv may have semicolons or tabs between
    its fields, where its header has no comma.

    Args:
        bad: takes the errors of lines that cannot be read, in place of raising the first.
    """
    kind = kind_of(path)
    if kind is None:
        raise unknown_kind(path, str(path))
    if path.exists() and not path.is_file():  # a pipe would keep us waiting
        raise UserError(f"{path} is not a file", str(path), "name a file of rows")
    try:
        if kind != ".parquet":
            _check_encoding(path)
        yield from _READERS[kind](path, bad)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (OSError, EOFError) as error:
        fix = "it must be readable and complete"
        raise UserError(f"cannot read the data file: {error}", str(path), fix) from error


def unknown_kind(path: Path, where: str) -> UserError:
    what = f"the data file {path} is none of {', '.join(SUFFIXES)}, nor one of them as .gz or .zst"
    return UserError(what, where, "convert it, or rename it")


def _open_text(path: Path, encoding: str = "utf-8-sig") -> io.TextIOBase:
    # utf-8-sig: spreadsheets write a byte order mark, which is no part of the first column's name.
    if path.suffix not in COMPRESSIONS:
        return path.open(encoding=encoding, newline="")
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path)), encoding=encoding, newline="")


def _check_encoding(path: Path) -> None:
    """Refuse UTF-16, half of whose bytes are zeros and may pass for UTF-8. Raises UserError."""
    with _open_text(path, "latin-1") as file:
        start = file.read(1024)
    if start.startswith(("\xff\xfe", "\xfe\xff")) or "\0" in start:
        raise UserError("the text is UTF-16 or binary, not UTF-8", f"{path}:1", "save it as UTF-8")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    with _open_text(path, "latin-1") as file:  # a character per byte
        for number, line in enumerate(file, 1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError as found:
                byte = found.object[found.start]
                what = f"the text is not UTF-8: byte 0x{byte:02x}, which cp1252 has for {_in_cp1252(byte)!r}"
                return UserError(what, f"{path}:{number}", "save it as UTF-8")
    return UserError(f"the text is not UTF-8: {error}", str(path), "save it as UTF-8")


def _in_cp1252(byte: int) -> str:
    return bytes([byte]).decode("cp1252", errors="replace")


def _iterate_jsonl(path: Path, bad: BadRows | None) -> Located:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):  # line by line: U+2028 inside a string is no line end
            if not line.strip():
                continue
            try:
                row = _parse(line, f"{path}:{number}")
            except UserError as error:
                report(error, bad)
                continue
            yield f"{path}:{number}", row


def _iterate_json(path: Path, bad: BadRows | None) -> Located:
    with _open_text(path) as file:
        text = file.read()
    rows = _parse(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError("a .json data file holds a list of objects", str(path), "put the rows in [ ... ]")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _iterate_csv(path: Path, bad: BadRows | None) -> Located:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 128 KiB
    fix = 'put a field that holds a separator, a quote or a line end in quotes, and a quote twice: "a ""b"""'
    with _open_text(path) as file:
        first = next(file, "")
        reader = csv.reader(chain([first], file), strict=True, **_layout(first, kind_of(path)))
        try:
            columns = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"not CSV: {error}", f"{path}:1", fix) from error
        _check_names(columns, f"{path}:1")
        while True:
            end = reader.line_num  # of the row before: an error comes after it
            try:
                fields = next(reader, None)
            except csv.Error as error:
                report(UserError(f"not CSV: {error}", f"{path}:{end + 1}", fix), bad)
                continue
            if fields is None:
                return
            if len(fields) not in (0, len(columns)):
                what = f"the row has {len(fields)} fields, the header {len(columns)}"
                report(UserError(what, f"{path}:{reader.line_num}", fix), bad)
            elif fields:
                yield f"{path}:{reader.line_num}", dict(zip(columns, fields, strict=True))


def _layout(header: str, kind: str) -> dict[str, Any]:
    """What stands between the fields of a file with this first line, as options of `csv.reader`."""

    def names(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([header], strict=True, delimiter=delimiter), [])
        except csv.Error:  # a name in quotes goes on in the next line
            return []

    others = [] if len(names(",")) > 1 else [mark for mark in ";\t" if len(names(mark)) > 1]
    delimiter = "\t" if kind == ".tsv" else max(others, key=lambda mark: len(names(mark)), default=",")
    behind = names(delimiter)[1:]
    return {"delimiter": delimiter, "skipinitialspace": bool(behind) and all(n[:1] == " " for n in behind)}


def _check_names(columns: list[str], where: str) -> None:
    """Refuse two columns of one name: one would hide the other. Raises UserError."""
    twice = [name for name, number in Counter(columns).items() if number > 1 and name]
    if twice:
        what = f"the name {twice[0]!r} stands for {columns.count(twice[0])} columns"
        raise UserError(what, where, "rename all but one, or remove them")


def _iterate_parquet(path: Path, bad: BadRows | None) -> Located:
    import pyarrow
    import pyarrow.parquet

    try:
        is_plain = path.suffix not in COMPRESSIONS
        source = path if is_plain else pyarrow.BufferReader(pyarrow.input_stream(str(path)).read())
        with pyarrow.parquet.ParquetFile(source) as file:
            _check_names(file.schema_arrow.names, str(path))
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            names = class_names(_features_of(file.schema_arrow.metadata))
            for number, row in enumerate(with_class_names(rows, names), 1):
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        what = f"not a readable parquet file: {error}"
        raise UserError(what, str(path), "write or copy it again") from error


_READERS = {
    ".jsonl": _iterate_jsonl,
    ".json": _iterate_json,
    ".csv": _iterate_csv,
    ".tsv": _iterate_csv,
    ".parquet": _iterate_parquet,
}


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([key for key, _ in pairs], where)
        return dict(pairs)

    try:
        return decode_json(text, parse_float=WrittenFloat, object_pairs_hook=unique)
    except ValueError as error:  # also a number of thousands of digits
        fix = ".jsonl holds one JSON object per line, .json one list of objects"
        raise UserError(f"not JSON: {error}", where, fix) from None


def _features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features of `datasets`, which it writes into a parquet file; empty where there are none."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column."""
    found = {}
    for column, feature in features.items():
        is_plain = isinstance(feature, dict)  # of JSON; else an object of `datasets`
        kind = feature.get("_type") if is_plain else type(feature).__name__
        names = feature.get("names") if is_plain else getattr(feature, "names", None)
        if kind == "ClassLabel" and names:
            found[column] = [str(name) for name in names]
    return found


def with_class_names(rows: Iterator[dict], names: dict[str, list[str]]) -> Iterator[dict]:
    """The rows with `NamedClass` for the numbers of ClassLabel columns; -1 there means no label."""
    for row in rows:
        for column, of_column in names.items():
            number = row.get(column)
            if isinstance(number, int) and number < len(of_column):
                row[column] = NamedClass(number, of_column) if number >= 0 else None
        yield row


def hash_model(folder: Path, with_weights: bool = False) -> list[str]:
    """Name and SHA-256 of each file of a model's configuration and tokenizer, and of its weights."""
    names = {file.name for file in folder.iterdir() if file.suffix in hub.CONFIG_SUFFIXES}
    if with_weights and not hub.missing_weights(folder):
        names |= set(hub.weight_files(folder))
    return [f"{name} {hash_file(folder / name)}" for name in sorted(names) if (folder / name).is_file()]


def hash_file(path: Path) -> str:
    """SHA-256 of a file. Raises UserError where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        fix = "name a file that is there and that you may read"
        raise UserError(f"cannot read {path}: {error.strerror}", str(path), fix) from error
