"""Looks at the rows of a source together: those that stand there twice, answers that are none.

Imports no torch.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Any

from speft_ds.data.conversations import Example

# What tables and people write where there is nothing.
PLACEHOLDERS = {"n/a", "#n/a", "nan", "null", "none", "nil", "tbd", "todo", "-", "?", "..."}
_ID = re.compile(r"(?:^|[^A-Za-z])(?:[UuGg][Uu])?[Ii][Dd]$|[a-z]I[dD]$")  # id, Ticket ID, rowId, uuid


class RowIds:
    """The rows of a source so far that have an id.

    An id may also be that of a user or a picture, which many rows have. So a row is a duplicate only where
    all of it was there before, its id included: as where files that overlap were joined.

    Args:
        said: gets a line where rows with one `id` are not alike.
    """

    def __init__(self, said: dict[str, str]):
        self.said = said
        self._rows: set[bytes] = set()
        self._first: dict[str, str] = {}  # id -> where
        self._columns: dict[str, bool] = {}  # name -> is it an id?
        self._num_unlike, self._example = 0, ""

    def is_duplicate(self, row: Any, where: str) -> bool:
        """Whether the row, which has an id, was there before."""
        if not isinstance(row, dict):
            return False
        names = [name for name in row if self._is_id(name) and row[name] not in (None, "")]
        if not names:
            return False
        digest = blake2b(repr(sorted(row.items())).encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._rows:
            return True
        self._rows.add(digest)
        for name in names:
            if name.lower() == "id" and isinstance(row[name], str | int):
                self._compare(str(row[name]), where)
        return False

    def _is_id(self, name: Any) -> bool:
        if name not in self._columns:
            self._columns[name] = isinstance(name, str) and _ID.search(name) is not None
        return self._columns[name]

    def _compare(self, own: str, where: str) -> None:
        first = self._first.setdefault(own, where)
        if first != where:
            self._num_unlike += 1
            self._example = self._example or f"{where} and {first}"
            what = f"{self._num_unlike:,} rows have the id of an earlier one and say something else"
            self.said[self._example] = f"{what}: all are trained on, the first {self._example}"


class Placeholders:
    """Responses that may stand for a missing one; they are trained on, for they may be meant.

    Args:
        said: gets a line on them.
    """

    def __init__(self, said: dict[str, str]):
        self.said = said
        self._first, self._num = "", 0

    def look_at(self, example: Example, where: str) -> None:
        """Count an example whose last turn is like that."""
        content = example.turns[-1].get("content")
        if isinstance(content, str) and content.strip().lower() in PLACEHOLDERS:
            self._num += 1
            self._first = self._first or f"{where}: {content.strip()}"
            what = f"{self._num:,} responses may stand for a missing one, and are trained on"
            self.said[self._first] = f"{what}, the first {self._first}"
