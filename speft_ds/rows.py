"""Training rows as they stand in a file. Imports no torch: the first rows are checked before a run starts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speft_ds.errors import UserError


def iterate_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl file (one object a line) or a .json file (a list), each with where it stands.

    Raises:
        UserError: a row is not JSON, or the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":  # line by line: U+2028 inside a string is no line end
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _parse(line, f"{path}:{number}")
                return
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        fix = "it must be readable UTF-8 text"
        raise UserError(f"cannot read the data file: {error}", str(path), fix) from error
    rows = _parse(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError("a .json data file holds a list of objects", str(path), "put the rows in [ ... ]")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fix = ".jsonl holds one JSON object a line, .json one list of objects"
        raise UserError(f"not JSON: {error}", where, fix) from None


def read_pairs(path: str, prompt_column: str, response_column: str) -> list[tuple[str, str]]:
    """All (prompt, response) pairs of a file.

    Raises:
        UserError: the file is unreadable or empty, or a row lacks a prompt or a response; names the row.
    """
    pairs = [
        (text_of(row, prompt_column, where), text_of(row, response_column, where))
        for where, row in iterate_objects(Path(path))
    ]
    if not pairs:
        raise UserError("the data file has no rows", path, "write at least one row into it")
    return pairs


def text_of(row: Any, column: str, where: str) -> str:
    """The non-empty text in a column of a row."""
    if not isinstance(row, dict):
        raise UserError("a row is not a JSON object", where, "each row is like {column: text, ...}")
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        problem = "has no" if value is None else "has an empty" if value == "" else "has an unusable"
        raise UserError(
            f"the row {problem} {column!r}",
            where=f"{where} (columns: {', '.join(row)})",
            fix="complete or delete the row, or set data.prompt_column and data.response_column",
        )
    return value
