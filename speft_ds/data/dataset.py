"""Tokenised rows on disk: one safetensors file, read row by row. Imports no torch to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from speft_ds.data.dataset import Row, pack
from speft_ds.errors import UserError


class TokenizedDataset(Sequence[Row]):
    """Sequences to train on: rows or, with packing, packs of rows.

    Args:
        path: a file that `prepare` wrote.

    Attributes:
        lengths, num_learnt: [rows] tokens of each row, and how many of them are learnt.
        sizes: sequences of each source, and `row_sizes`: rows; those of a source follow each other.
        facts: what was done to the rows: `sources` (a dict of counts each), `classes` (names, or None),
            `samples` (pieces of text, each with whether it is learnt), `sha256` of all rows and packs.
    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            file = safe_open(path, framework="np")
            self.facts = json.loads(file.metadata()["facts"])
            self._ids, self._spans = file.get_slice("ids"), file.get_tensor("spans")
            edges = {name: file.get_tensor(name) for name in ("row_edges", "span_edges", "pack_edges")}
            self._classes, self._packs = file.get_tensor("labels"), file.get_tensor("packs")
            self.sizes, self.row_sizes = map(tuple, file.get_tensor("sizes").tolist())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not readable: {error}", str(path), f"rm {path}") from error
        self._row_edges, self._span_edges, self._pack_edges = edges.values()
        self.lengths = np.diff(self._row_edges)
        learnt = np.concatenate([[0], np.cumsum(self._spans[:, 1] - self._spans[:, 0])])
        self.num_learnt = np.diff(learnt[self._span_edges])

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def is_packed(self) -> bool:
        return len(self._pack_edges) > 1

    def __len__(self) -> int:
        return len(self._pack_edges) - 1 if self.is_packed else self.num_rows

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if not self.is_packed:
            return self.row(number)
        first, last = self._pack_edges[number : number + 2]
        return pack([self.row(row) for row in self._packs[first:last]])

    def row(self, number: int) -> Row:
        """One row by itself, packed or not."""
        if not 0 <= number < self.num_rows:
            raise IndexError(number)
        start, stop = self._row_edges[number : number + 2]
        first, last = self._span_edges[number : number + 2]
        label = int(self._classes[number]) if len(self._classes) else None
        spans = [tuple(span) for span in self._spans[first:last].tolist()]
        return Row(self._ids[start:stop].tolist(), spans, label=label)

    def rows(self) -> Sequence[Row]:
        """All rows by themselves, for calibration."""
        return _Rows(self)

    def sequence_lengths(self) -> np.ndarray:
        """[len(self)] tokens of each sequence."""
        if not self.is_packed:
            return self.lengths
        return np.add.reduceat(self.lengths[self._packs], self._pack_edges[:-1])


@dataclass(frozen=True)
class _Rows(Sequence[Row]):
    corpus: TokenizedDataset

    def __len__(self) -> int:
        return self.corpus.num_rows

    def __getitem__(self, number: int) -> Row:
        return self.corpus.row(number)


def is_whole(path: Path) -> bool:
    """Whether there is a corpus that can be read; a damaged one is made anew."""
    try:
        return path.is_file() and bool(TokenizedDataset(path))
    except UserError:
        return False


def write_corpus(path: Path, by_source: list[list[Row]], packs: list[list[list[int]]], facts: dict) -> None:
    """Write a corpus whole or not at all.

    Args:
        by_source: the rows of each source.
        packs: row numbers within each source, a list a pack; empty where rows are not packed.
        facts: see `Corpus`.
    Raises:
        OSError: it cannot be written.
    """
    import torch

    from speft_ds.io import write_safetensors

    rows = [row for rows in by_source for row in rows]
    firsts = np.cumsum([0, *(len(rows) for rows in by_source)])
    all_packs = [
        [first + n for n in numbers]
        for first, source in zip(firsts, packs, strict=False)
        for numbers in source
    ]
    arrays = {
        "ids": _flat((row.ids for row in rows), np.int32),
        "row_edges": _edges(len(row.ids) for row in rows),
        "spans": _flat((span for row in rows for span in row.spans), np.int32).reshape(-1, 2),
        "span_edges": _edges(len(row.spans) for row in rows),
        "labels": np.array([row.label for row in rows if row.label is not None], np.int32),
        "packs": _flat(all_packs, np.int64),
        "pack_edges": _edges(map(len, all_packs)),
        "sizes": np.array([[len(source) for source in by] for by in (packs or by_source, by_source)]),
    }
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_safetensors(path, tensors, {"facts": json.dumps({**facts, "sha256": digest.hexdigest()})})


def _flat(lists, dtype) -> np.ndarray:
    arrays = [np.asarray(values, dtype) for values in lists]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _edges(lengths) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)
