"""Which rows are trained on: `data.select`. Imports no torch by itself."""

from __future__ import annotations

from speft_ds.data.dataset import NOT_SELECTED, Row, Table
from speft_ds.data.dataset_cache import DatasetSpec
from speft_ds.errors import UserError


def select_rows(tables: list[Table], request: DatasetSpec) -> None:
    """Keep the rows that `data.select` takes of all sources together."""
    data, rows = request.data, [row for table in tables for row in table.rows]
    if data.select == "all":
        return
    if data.select_rows > len(rows):
        what = f"data.select_rows={data.select_rows} is more than the {len(rows)} rows there are"
        raise UserError(what, "data.select_rows", f"data.select_rows={len(rows)}, or data.select=all")
    chosen = set(_SELECTIONS[data.select](tables, rows, request))
    first = 0
    for table in tables:
        kept = [row for number, row in enumerate(table.rows, first) if number in chosen]
        first += len(table.rows)
        table.counts[NOT_SELECTED] = len(table.rows) - len(kept)
        table.rows = kept


def _longest(tables: list[Table], rows: list[Row], request: DatasetSpec) -> list[int]:
    """By tokens of the response (Zhao et al., "Long Is More for Alignment", 2024); ties by position."""
    return sorted(range(len(rows)), key=lambda n: -rows[n].num_labels)[: request.data.select_rows]


def _random(tables: list[Table], rows: list[Row], request: DatasetSpec) -> list[int]:
    from speft_ds.data.sampler import permutation

    return permutation(len(rows), request.seed, "select")[: request.data.select_rows]


def _ifd(tables: list[Table], rows: list[Row], request: DatasetSpec) -> list[int]:
    from speft_ds.data.ifd import choose, ifd_scores  # late: it imports torch

    texts = [text for table in tables for text in table.texts]
    return choose(ifd_scores(texts, request.data.scorer), request.data.select_rows)


_SELECTIONS = {"longest": _longest, "random": _random, "ifd": _ifd}
