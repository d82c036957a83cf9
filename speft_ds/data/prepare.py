"""The rows of a recipe: read, tokenised, selected and packed once, then kept on disk.

One file a corpus, `~/.cache/speft_ds/rows/<key>.safetensors`, keyed by the contents of the data, the
tokenizer and all that shapes the rows. Imports no torch, so that a second start costs next to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speft_ds import hub
from speft_ds.config.data_config import DataConfig, Source
from speft_ds.data.dataset import (
    COUNTED,
    EMPTY,
    Table,
    TokenizedDataset,
    fetch_scorer,
    is_whole,
    write_corpus,
)
from speft_ds.data.dataset_cache import DatasetSpec
from speft_ds.data.formats import Classes, EmptyRow, Example, find_classes, make_example
from speft_ds.data.packing import first_fit
from speft_ds.data.readers import Located, iterate_rows
from speft_ds.data.select import select_rows
from speft_ds.data.tokenize import Encoder
from speft_ds.errors import UserError

BATCH = 1000  # rows tokenised in one call, on all cores
NUM_SAMPLES = 3  # rows kept as text, to be shown


def find_cached(request: DatasetSpec) -> TokenizedDataset | None:
    """The corpus of a request, if it was made before. Raises UserError for data that is not there."""
    path = request.path()
    return TokenizedDataset(path) if is_whole(path) else None


def prepare(
    request: DatasetSpec, load_tokenizer: Callable[[], Any], say: Callable[[str], None] = print
) -> TokenizedDataset:
    """The corpus of a request: from the cache, or made now. Safe when several jobs want it at once.

    Args:
        load_tokenizer: called only where the rows are made now.
        say: shows a line on what is being done.
    Raises:
        UserError: the data is not there, a row cannot be used, no row is left, or the cache is not writable.
    """
    from filelock import FileLock

    if hub.model_folder(request.model) is None:
        load_tokenizer()  # fetches it: the key goes by its files
    if request.data.scorer and hub.model_folder(request.data.scorer) is None:
        fetch_scorer(request.data.scorer)
    path = request.path()
    if is_whole(path):  # in a folder that may be shared, and not writable
        return TokenizedDataset(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The rename at the end of writing makes it safe; the lock saves the others from doing the same work.
        with FileLock(path.with_suffix(".lock")):
            if not is_whole(path):
                say(f"tokenising {', '.join(source.path for source in request.data.sources)}")
                make_corpus(request, load_tokenizer(), path)
    except OSError as error:
        fix = "free space, or set SPEFT_DS_CACHE to a folder on another disk"
        raise UserError(f"cannot write the tokenised rows: {error}", str(path.parent), fix) from error
    return TokenizedDataset(path)


def make_corpus(request: DatasetSpec, tokenizer: Any, path: Path) -> None:
    """Read, tokenise, select and pack the rows of a request, and write them to `path`."""
    data = request.data
    classes = classes_of(data)
    encoder = Encoder(tokenizer, data.max_length, data.long_rows)
    keeps_text = data.select == "ifd"
    tables = [
        _read_source(number, request, encoder, classes, keeps_text) for number in range(len(data.sources))
    ]
    select_rows(tables, request)
    for number, table in enumerate(tables):
        if not table.rows:
            what = f"of {table.counts['rows']} rows none is left: {_counts(table.counts)}"
            fix = "data.max_length, data.long_rows, data.empty_rows and data.select_rows leave rows out"
            raise UserError(what, request.where(number), fix)
    packs = [first_fit([len(row.ids) for row in t.rows], data.max_length) for t in tables if data.packing]
    facts = {
        "sources": [table.counts for table in tables],
        "classes": classes.names if classes else None,
        "samples": [row.as_text(tokenizer) for row in tables[0].rows[:NUM_SAMPLES]],
    }
    write_corpus(path, [table.rows for table in tables], packs, facts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if what != "rows" and number)


def classes_of(data: DataConfig) -> Classes | None:
    """The classes that the recipe names or its rows have; None for other formats. Raises UserError."""
    sources = [source for source in data.sources if source.format == "classification"]
    if not sources:
        return None
    if data.labels is not None:
        return Classes.named(data.labels)
    column = sources[0].columns.label
    return find_classes((row for source in sources for row in _labels(source, column)), column)


def _labels(source: Source, column: str) -> Located:
    """The rows of a source, their label in this column whatever the source calls it."""
    own = source.columns.label
    for where, row in iterate_rows(source):
        yield where, {column: row[own]} if isinstance(row, dict) and own in row else {}


def _read_source(
    number: int, request: DatasetSpec, encoder: Encoder, classes: Classes | None, keeps_text: bool
) -> Table:
    source = request.data.sources[number]
    table = Table([], dict.fromkeys(COUNTED, 0), [])
    rows = tqdm(iterate_rows(source), desc=source.path, unit=" rows", disable=not sys.stderr.isatty())
    examples = _examples(rows, source, request, classes, table.counts)
    while batch := list(islice(examples, BATCH)):
        for (_, example), (row, change) in zip(batch, encoder.encode(batch), strict=True):
            if change:
                table.counts[change] += 1
            if row is not None:
                # A list of Python integers would take nine times the memory.
                table.rows.append(replace(row, ids=np.asarray(row.ids, np.int32)))
                if keeps_text:
                    table.texts.append(_prompt_and_response(example))
    if not table.counts["rows"]:
        raise UserError(f"{source.path} has no rows", request.where(number), "write at least one row into it")
    return table


def _examples(
    rows: Located, source: Source, request: DatasetSpec, classes: Classes | None, counts: dict[str, int]
) -> Iterator[tuple[str, Example]]:
    for where, row in rows:
        counts["rows"] += 1
        try:
            yield where, make_example(row, where, source, classes, request.classify)
        except EmptyRow:
            if request.data.empty_rows == "refuse":
                raise
            counts[EMPTY] += 1


def _prompt_and_response(example: Example) -> tuple[str, str]:
    *before, last = example.turns
    return "".join(turn["content"] + "\n" for turn in before), last["content"]
