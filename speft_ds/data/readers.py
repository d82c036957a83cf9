"""Readers: training rows as they stand in a file, in a folder or on the hub. Imports no torch.

Files are read by the standard library and pyarrow, so that an error names the line; folders and hub ids,
with their subsets and splits, by `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speft_ds import hub
from speft_ds.config.data_config import Source
from speft_ds.errors import UserError, did_you_mean
from speft_ds.io import sha256_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
Located = Iterator[tuple[str, Any]]  # where a row stands, and the row


def is_hub_dataset(path: str) -> bool:
    """Whether a path can only be meant as owner/name on the hub."""
    return hub.is_hub_id(path) and not kind_of(path)


def kind_of(path: str | Path) -> str | None:
    """The format of a file of rows by its name, compression aside: one of SUFFIXES, or None."""
    name = Path(path)
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
    return name.suffix if name.suffix in SUFFIXES else None


def iterate_rows(source: Source) -> Located:
    """The rows of a source, each with where it stands.

    Raises:
        UserError: no such data, a row that cannot be read, or a data set without this subset or split.
    """
    if os.path.isdir(source.path):
        files = folder_files(source)
        # By our own readers where they can: `datasets` reads CSV by pandas, to which "018" is the number 18.
        if all(kind_of(file) for file in files):
            return (located for file in files for located in iterate_file(file))
    elif not is_hub_dataset(source.path):
        return iterate_file(Path(source.path))
    rows = ask_datasets(source, "load_dataset", split=source.split)
    return ((f"{source.path} ({source.split}), row {number}", row) for number, row in enumerate(rows, 1))


def iterate_file(path: Path) -> Located:
    """The rows of a file: .jsonl (one object per line), .json (a list), .csv (with a header), .parquet.

    Each may be compressed (.gz, .zst); parquet compresses itself.
    """
    kind = kind_of(path)
    if kind is None:
        raise unknown_kind(path, str(path))
    try:
        yield from _READERS[kind](path)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        fix = "it must be readable, complete and, but for parquet, UTF-8 text"
        raise UserError(f"cannot read the data file: {error}", str(path), fix) from error


def unknown_kind(path: Path, where: str) -> UserError:
    what = f"the data file {path} is none of {', '.join(SUFFIXES)}, nor one of them as .gz or .zst"
    return UserError(what, where, "convert it, or rename it")


def _open_text(path: Path) -> io.TextIOBase:
    # utf-8-sig: spreadsheets write a byte order mark, which is no part of the first column's name.
    if path.suffix not in COMPRESSIONS:
        return path.open(encoding="utf-8-sig", newline="")
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path)), encoding="utf-8-sig", newline="")


def _iterate_jsonl(path: Path) -> Located:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):  # line by line: U+2028 inside a string is no line end
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _iterate_json(path: Path) -> Located:
    with _open_text(path) as file:
        text = file.read()
    rows = _parse(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError("a .json data file holds a list of objects", str(path), "put the rows in [ ... ]")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _iterate_csv(path: Path) -> Located:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 128 KiB
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        fix, end = 'quote a field that holds a comma or a line end: "..."', 0
        try:
            columns, end = reader.fieldnames, reader.line_num  # of the row before: an error comes after it
            for row in reader:
                end = reader.line_num
                where = f"{path}:{end}"
                if None in row or None in row.values():
                    what = f"the row has more or fewer fields than the header's {len(columns)}"
                    raise UserError(what, where, fix)
                yield where, row
        except csv.Error as error:
            raise UserError(f"not CSV: {error}", f"{path}:{end + 1}", fix) from error


def _iterate_parquet(path: Path) -> Located:
    import pyarrow
    import pyarrow.parquet

    try:
        is_plain = path.suffix not in COMPRESSIONS
        source = path if is_plain else pyarrow.BufferReader(pyarrow.input_stream(str(path)).read())
        with pyarrow.parquet.ParquetFile(source) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        what = f"not a readable parquet file: {error}"
        raise UserError(what, str(path), "write or copy it again") from error


_READERS = {
    ".jsonl": _iterate_jsonl,
    ".json": _iterate_json,
    ".csv": _iterate_csv,
    ".parquet": _iterate_parquet,
}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        fix = ".jsonl holds one JSON object per line, .json one list of objects"
        raise UserError(f"not JSON: {error}", where, fix) from None


def folder_files(source: Source) -> list[Path]:
    """The files of a split of a folder. Raises UserError: no such subset or split, or no data at all."""
    splits = ask_datasets(source, "load_dataset_builder").config.data_files or {}
    if source.split not in splits:
        what = f"{source.path} has no split {source.split!r}; it has {', '.join(map(str, splits)) or 'none'}"
        raise UserError(what, source.path, did_you_mean(source.split, map(str, splits)))
    return [Path(file) for file in splits[source.split]]


def ask_datasets(source: Source, function: str, **options):
    """The result of a function of `datasets`, `load_dataset` or `load_dataset_builder`, for a source.

    Raises:
        UserError: it is not there, the hub cannot be reached, or it has no such subset or split.
    """
    if is_hub_dataset(source.path) and not hub.has_dataset(source.path) and not hub.is_reachable():
        raise hub.cannot_fetch(f"the data set {source.path}", source.path, hub.dataset_hint(source.path))
    import datasets  # late: it takes a second
    import pyarrow

    path, subset, revision, fix = source.path, source.subset, source.revision, hub.dataset_hint(source.path)
    if os.path.isdir(path):
        # As an absolute path: what looks like a hub id would be looked for there first.
        path, revision = os.path.abspath(path), None
        fix = "its files must be readable and complete, and have the same columns"
        # A subset is what the folder's README.md says it is or, where there is none, a folder in it.
        if subset and os.path.isdir(f"{path}/{subset}") and not os.path.isfile(f"{path}/README.md"):
            path, subset = f"{path}/{subset}", None
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        return getattr(datasets, function)(path, subset, revision=revision, **options)
    except RuntimeError as error:  # a data set that is a program
        problem, fix = error, "set data.path to its files of rows, or to a copy of it as parquet"
    except (OSError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException) as error:
        problem = error.__cause__ or error
    except (ValueError, KeyError) as error:  # no such subset or split: the message lists those there are
        problem = error
        fix = "data.subset and data.split name one part of it, data.revision a version on the hub"
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
    raise UserError(f"cannot load the data set {source.path}: {problem}", source.path, fix) from problem


def hash_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Name and SHA-256 of each file of these kinds in a folder."""
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    return [f"{file.name} {hash_file(file)}" for file in files]


def hash_file(path: Path) -> str:
    """SHA-256 of a file. Raises UserError where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        fix = "name a file that is there and that you may read"
        raise UserError(f"cannot read {path}: {error.strerror}", str(path), fix) from error
