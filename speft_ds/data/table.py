"""The rows of a source on their way into a corpus. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from speft_ds.data.dataset import Row
from speft_ds.data.tokenize import LONG_ROWS, NOTHING_LEARNT

EMPTY, NOT_SELECTED = "empty, left out", "not selected"
COUNTED = ("rows", EMPTY, NOTHING_LEARNT, *LONG_ROWS, NOT_SELECTED)  # what may become of a row


@dataclass
class Table:
    """The rows of one source on their way into the file, and what became of those that it had."""

    rows: list[Row]
    counts: dict[str, int]
    texts: list[tuple[str, str]]  # (prompt, response), where the selection scores them
