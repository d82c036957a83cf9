"""The training rows of a recipe: read, tokenised, selected and packed once, then kept on disk.

One file a corpus, `~/.cache/speft_ds/rows/<key>.safetensors`, keyed by the contents of the data, the
tokenizer and all that shapes the rows. Imports no torch, so that a second start costs next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from speft_ds import hub
from speft_ds.data.formats import Classes, EmptyRow, Example, find_classes, make_example
from speft_ds.data.packing import first_fit
from speft_ds.data.rows import Row, pack
from speft_ds.data.sources import Located, is_hub_id, iterate_rows, load_builder
from speft_ds.data.tokens import LONG_ROWS, NOTHING_LEARNT, Encoder
from speft_ds.errors import UserError
from speft_ds.schema import Data, Recipe, Source, cache_folder

FORMAT_VERSION = "1"  # of the file, and of what tokenising does: another version is another key
BATCH = 1000  # rows tokenised in one call, on all cores
NUM_SAMPLES = 3  # rows kept as text, to be shown
EMPTY, NOT_SELECTED = "empty, left out", "not selected"
# All that a tokenizer, or a small model that scores rows, is loaded from.
MODEL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
WEIGHT_FILES = (".safetensors", ".bin")


class Corpus(Sequence[Row]):
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
    corpus: Corpus

    def __len__(self) -> int:
        return self.corpus.num_rows

    def __getitem__(self, number: int) -> Row:
        return self.corpus.row(number)


@dataclass(frozen=True)
class Request:
    """Which corpus is wanted.

    Attributes:
        data: the data section, its sources those to read.
        model: whose tokenizer; a local folder or a hub id.
        classify: for sequence classification.
        seed: of the recipe, for `data.select=random`.
        where: source -> what an error says of where it is named.
    """

    data: Data
    model: str
    classify: bool = False
    seed: int = 0
    where: Callable[[int], str] = field(default=lambda number: "data.path", compare=False)

    def key(self) -> str:
        """Hash of everything that the corpus depends on. Raises UserError for data that is not there."""
        data = self.data.model_dump(mode="json", exclude={"path", "mixture"})
        options = [source.model_dump(mode="json", exclude={"path", "weight"}) for source in self.data.sources]
        seed = self.seed if self.data.select == "random" else None
        parts = [
            FORMAT_VERSION,
            *(version(name) for name in ("transformers", "tokenizers")),
            data,
            options,
            self.classify,
            seed,
            hash_model(self.model, MODEL_FILES),
            hash_model(self.data.scorer, MODEL_FILES + WEIGHT_FILES),
            self.data.scorer and scorer_dtype(),
            [hash_source(source) for source in self.data.sources],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def request_of(recipe: Recipe) -> Request:
    """The corpus that a run of this recipe trains on. Raises UserError where it names no rows."""
    if not recipe.data.sources:
        fix = "type data.path=/the/right/path"
        raise UserError("the recipe names no rows", recipe.where("data.path"), fix)
    classify = recipe.model.task == "sequence_classification"
    return Request(recipe.data, recipe.model.name_or_path, classify, recipe.seed, recipe.where_rows)


def find_cached(request: Request) -> Corpus | None:
    """The corpus of a request, if it was made before. Raises UserError for data that is not there."""
    path = cache_folder("rows") / f"{request.key()}.safetensors"
    return Corpus(path) if is_whole(path) else None


def prepare(
    request: Request, load_tokenizer: Callable[[], Any], say: Callable[[str], None] = print
) -> Corpus:
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
    path = cache_folder("rows") / f"{request.key()}.safetensors"
    if is_whole(path):  # in a folder that may be shared, and not writable
        return Corpus(path)
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
    return Corpus(path)


def is_whole(path: Path) -> bool:
    """Whether there is a corpus that can be read; a damaged one is made anew."""
    try:
        return path.is_file() and bool(Corpus(path))
    except UserError:
        return False


def hash_model(model: str | None, suffixes: tuple[str, ...]) -> list[str] | str | None:
    """What identifies a model, as far as files of these kinds go: a hash of each."""
    folder = hub.model_folder(model) if model else None
    if folder is None:
        return model
    files = sorted(file for file in folder.iterdir() if file.suffix in suffixes and file.is_file())
    return [f"{file.name} {hash_file(file)}" for file in files]


def scorer_dtype() -> str:
    """Scores depend on it, and it on the machine."""
    from speft_ds.data.ifd import choose_dtype

    return str(choose_dtype())


def fetch_scorer(scorer: str) -> None:
    """Have the hub's cache hold the model that scores rows. Raises UserError."""
    from speft_ds.data.ifd import find_folder

    find_folder(scorer)


def hash_source(source: Source) -> str:
    """What identifies the rows of a source: the bytes of its files, or the version on the hub."""
    if is_hub_id(source.path):
        return str(load_builder(source).cache_dir)
    path = Path(source.path)
    if not path.is_dir():
        return hash_file(path)
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    lines = [f"{name} {hash_file(path / name)}" for name in names if ".cache" not in name.parts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", str(path)) from error


def make_corpus(request: Request, tokenizer: Any, path: Path) -> None:
    """Read, tokenise, select and pack the rows of a request, and write them to `path`."""
    data = request.data
    classes = classes_of(data)
    encoder = Encoder(tokenizer, data.max_length, data.long_rows)
    keeps_text = data.select == "ifd"
    tables = [
        _read_source(number, request, encoder, classes, keeps_text) for number in range(len(data.sources))
    ]
    _select(tables, request)
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
    _write(path, [table.rows for table in tables], packs, facts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if what != "rows" and number)


@dataclass
class _Table:
    """The rows of one source on their way into the file, and what became of those that it had."""

    rows: list[Row]
    counts: dict[str, int]
    texts: list[tuple[str, str]]  # (prompt, response), where the selection scores them


def classes_of(data: Data) -> Classes | None:
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
    number: int, request: Request, encoder: Encoder, classes: Classes | None, keeps_text: bool
) -> _Table:
    source = request.data.sources[number]
    table = _Table([], dict.fromkeys(("rows", EMPTY, NOTHING_LEARNT, *LONG_ROWS, NOT_SELECTED), 0), [])
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
    rows: Located, source: Source, request: Request, classes: Classes | None, counts: dict[str, int]
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


def _select(tables: list[_Table], request: Request) -> None:
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


def _longest(tables: list[_Table], rows: list[Row], request: Request) -> list[int]:
    """By tokens of the response (Zhao et al., "Long Is More for Alignment", 2024); ties by position."""
    return sorted(range(len(rows)), key=lambda n: -rows[n].num_labels)[: request.data.select_rows]


def _random(tables: list[_Table], rows: list[Row], request: Request) -> list[int]:
    from speft_ds.data.order import permutation

    return permutation(len(rows), request.seed, "select")[: request.data.select_rows]


def _ifd(tables: list[_Table], rows: list[Row], request: Request) -> list[int]:
    from speft_ds.data.ifd import choose, ifd_scores  # late: it imports torch

    texts = [text for table in tables for text in table.texts]
    return choose(ifd_scores(texts, request.data.scorer), request.data.select_rows)


_SELECTIONS = {"longest": _longest, "random": _random, "ifd": _ifd}


def _write(path: Path, by_source: list[list[Row]], packs: list[list[list[int]]], facts: dict) -> None:
    import torch

    from speft_ds.tensor_files import write_safetensors

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
