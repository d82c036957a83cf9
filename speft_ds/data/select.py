"""Which rows are trained on: `data.select`. Imports no torch by itself."""

from __future__ import annotations

from dataclasses import dataclass

from speft_ds.config.data_config import DataConfig
from speft_ds.data.dataset import Row
from speft_ds.data.tokenize import LONG_ROWS, NOTHING_LEARNT
from speft_ds.errors import UserError

EMPTY, NOT_SELECTED = "empty, left out", "not selected"
COUNTED = ("rows", EMPTY, NOTHING_LEARNT, *LONG_ROWS, NOT_SELECTED)  # what may become of a row


@dataclass
class Table:
    """The rows of one source on their way into the file, and what became of those that it had."""

    rows: list[Row]
    counts: dict[str, int]
    texts: list[tuple[str, str]]  # (prompt, response), where the selection scores them


def select_rows(tables: list[Table], data: DataConfig, seed: int) -> None:
    """Keep the rows that `data.select` takes of all sources together."""
    rows = [row for table in tables for row in table.rows]
    if data.select == "all":
        return
    if data.select_rows > len(rows):
        what = f"data.select_rows={data.select_rows} is more than the {len(rows)} rows there are"
        raise UserError(what, "data.select_rows", f"data.select_rows={len(rows)}, or data.select=all")
    chosen = set(_SELECTIONS[data.select](tables, rows, data, seed))
    first = 0
    for table in tables:
        kept = [row for number, row in enumerate(table.rows, first) if number in chosen]
        first += len(table.rows)
        table.counts[NOT_SELECTED] = len(table.rows) - len(kept)
        table.rows = kept


def _longest(tables: list[Table], rows: list[Row], data: DataConfig, seed: int) -> list[int]:
    """By tokens of the response (Zhao et al., "Long Is More for Alignment", 2024); ties by position."""
    return sorted(range(len(rows)), key=lambda n: -rows[n].num_labels)[: data.select_rows]


def _random(tables: list[Table], rows: list[Row], data: DataConfig, seed: int) -> list[int]:
    from speft_ds.data.sampler import permutation

    return permutation(len(rows), seed, "select")[: data.select_rows]


def _ifd(tables: list[Table], rows: list[Row], data: DataConfig, seed: int) -> list[int]:
    from speft_ds.data.ifd import choose, ifd_scores  # late: it imports torch

    texts = [text for table in tables for text in table.texts]
    return choose(ifd_scores(texts, data.scorer), data.select_rows)


_SELECTIONS = {"longest": _longest, "random": _random, "ifd": _ifd}
