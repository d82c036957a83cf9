"""Tokenised rows, made once and kept on disk: the key they are kept under, finding them, making them.

One file per dataset, `~/.cache/speft_ds/rows/<key>.safetensors`, keyed by the contents of the data, the
tokenizer and all that shapes the rows. Imports no torch, so that a second start costs next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speft_ds import hub
from speft_ds.config.data_config import DataConfig, Source
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import TokenizedDataset, is_readable, write_dataset
from speft_ds.data.formats import Classes, EmptyRow, Example, find_classes, make_example
from speft_ds.data.packing import first_fit
from speft_ds.data.readers import Located, is_hub_dataset, iterate_rows, load_builder
from speft_ds.data.select import COUNTED, EMPTY, Table, select_rows
from speft_ds.data.tokenize import Encoder
from speft_ds.env import cache_folder
from speft_ds.errors import UserError

FORMAT_VERSION = "1"  # of the file, and of what tokenising does: another version is another key
# All that a tokenizer, or a small model that scores rows, is loaded from.
MODEL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class DatasetSpec:
    """Which corpus is wanted.

    Attributes:
        data: the data section, its sources those to read.
        model: whose tokenizer; a local folder or a hub id.
        classify: for sequence classification.
        seed: of the recipe, for `data.select=random`.
        where: source -> what an error says of where it is named.
    """

    data: DataConfig
    model: str
    classify: bool = False
    seed: int = 0
    where: Callable[[int], str] = field(default=lambda number: "data.path", compare=False)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DatasetSpec:
        """The rows that a run of this recipe trains on. Raises UserError where it names none."""
        if not recipe.data.sources:
            fix = "type data.path=/the/right/path"
            raise UserError("the recipe names no rows", recipe.where("data.path"), fix)
        classify = recipe.model.task == "sequence_classification"
        return cls(recipe.data, recipe.model.name_or_path, classify, recipe.seed, recipe.where_rows)

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

    def path(self) -> Path:
        """Where the corpus is kept. Raises UserError for data that is not there."""
        return cache_folder("rows") / f"{self.key()}.safetensors"


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
    if is_hub_dataset(source.path):
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


BATCH = 1000  # rows tokenised in one call, on all cores
NUM_SAMPLES = 3  # rows kept as text, to be shown


def find_cached(spec: DatasetSpec) -> TokenizedDataset | None:
    """The corpus of a request, if it was made before. Raises UserError for data that is not there."""
    path = spec.path()
    return TokenizedDataset(path) if is_readable(path) else None


def prepare(
    spec: DatasetSpec, load_tokenizer: Callable[[], Any], say: Callable[[str], None] = print
) -> TokenizedDataset:
    """The corpus of a request: from the cache, or made now. Safe when several jobs want it at once.

    Args:
        load_tokenizer: called only where the rows are made now.
        say: shows a line on what is being done.
    Raises:
        UserError: the data is not there, a row cannot be used, no row is left, or the cache is not writable.
    """
    from filelock import FileLock

    if hub.model_folder(spec.model) is None:
        load_tokenizer()  # fetches it: the key goes by its files
    if spec.data.scorer and hub.model_folder(spec.data.scorer) is None:
        fetch_scorer(spec.data.scorer)
    path = spec.path()
    if is_readable(path):  # in a folder that may be shared, and not writable
        return TokenizedDataset(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The rename at the end of writing makes it safe; the lock saves the others from doing the same work.
        with FileLock(path.with_suffix(".lock")):
            if not is_readable(path):
                say(f"tokenising {', '.join(source.path for source in spec.data.sources)}")
                make_dataset(spec, load_tokenizer(), path)
    except OSError as error:
        fix = "free space, or set SPEFT_DS_CACHE to a folder on another disk"
        raise UserError(f"cannot write the tokenised rows: {error}", str(path.parent), fix) from error
    return TokenizedDataset(path)


def make_dataset(spec: DatasetSpec, tokenizer: Any, path: Path) -> None:
    """Read, tokenise, select and pack the rows of a request, and write them to `path`."""
    data = spec.data
    classes = classes_of(data)
    encoder = Encoder(tokenizer, data.max_length, data.long_rows)
    keeps_text = data.select == "ifd"
    tables = [_read_source(number, spec, encoder, classes, keeps_text) for number in range(len(data.sources))]
    select_rows(tables, data, spec.seed)
    for number, table in enumerate(tables):
        if not table.rows:
            what = f"of {table.counts['rows']} rows none is left: {_counts(table.counts)}"
            fix = "data.max_length, data.long_rows, data.empty_rows and data.select_rows leave rows out"
            raise UserError(what, spec.where(number), fix)
    packs = [first_fit([len(row.ids) for row in t.rows], data.max_length) for t in tables if data.packing]
    facts = {
        "sources": [table.counts for table in tables],
        "classes": classes.names if classes else None,
        "samples": [row.as_text(tokenizer) for row in tables[0].rows[:NUM_SAMPLES]],
    }
    write_dataset(path, [table.rows for table in tables], packs, facts)


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
    number: int, spec: DatasetSpec, encoder: Encoder, classes: Classes | None, keeps_text: bool
) -> Table:
    source = spec.data.sources[number]
    table = Table([], dict.fromkeys(COUNTED, 0), [])
    rows = tqdm(iterate_rows(source), desc=source.path, unit=" rows", disable=not sys.stderr.isatty())
    examples = _examples(rows, source, spec, classes, table.counts)
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
        raise UserError(f"{source.path} has no rows", spec.where(number), "write at least one row into it")
    return table


def _examples(
    rows: Located, source: Source, spec: DatasetSpec, classes: Classes | None, counts: dict[str, int]
) -> Iterator[tuple[str, Example]]:
    for where, row in rows:
        counts["rows"] += 1
        try:
            yield where, make_example(row, where, source, classes, spec.classify)
        except EmptyRow:
            if spec.data.empty_rows == "refuse":
                raise
            counts[EMPTY] += 1


def _prompt_and_response(example: Example) -> tuple[str, str]:
    *before, last = example.turns
    return "".join(turn["content"] + "\n" for turn in before), last["content"]
