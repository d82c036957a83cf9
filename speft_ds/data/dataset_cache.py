"""Datasets made and kept: their key, finding them in the cache, and reading, selecting and packing the rows.

There is one file per dataset, `~/.cache/speft_ds/rows/<key>.safetensors`, keyed by the contents of the data,
the tokenizer and all that shapes the rows. Imports no torch, so that a second start costs next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speft_ds import hub
from speft_ds.config.data_config import DataConfig, Source
from speft_ds.config.recipe import Recipe
from speft_ds.data.bad_rows import BadRows
from speft_ds.data.chat_template import writes_date
from speft_ds.data.conversations import EmptyRow, Example
from speft_ds.data.dataset import Row, TokenizedDataset, write_dataset
from speft_ds.data.formats import Classes, find_classes, make_example
from speft_ds.data.readers import Located, hash_file, hash_model
from speft_ds.data.row_checks import Placeholders, RowIds
from speft_ds.data.row_counts import COUNTED, DUPLICATE, EMPTY, NOT_SELECTED
from speft_ds.data.sources import (
    ask_datasets,
    files_without_split,
    is_hub_dataset,
    is_pattern,
    iterate_rows,
    some,
    source_files,
)
from speft_ds.data.tokenize import Encoded, Encoder, batches, stop_ids
from speft_ds.env import cache_folder
from speft_ds.errors import UserError
from speft_ds.terminal import duration

FORMAT_VERSION = "6"  # of the file, and of what tokenising does: another version is another key
NUM_SAMPLES = 3  # rows kept as text, to be shown
PART_S = 10.0  # of tokenising, by which the rest is estimated


@dataclass(frozen=True)
class DatasetSpec:
    """All that decides what is in a dataset.

    Attributes:
        model: whose tokenizer; a local folder or a hub id.
        classify: for sequence classification.
        seed: of the recipe, for `data.select=random`.
        where: number of a source -> what an error says of where it is named.
        add_tokens: that the tokenizer has beside the model's.
    """

    data: DataConfig
    model: str
    classify: bool = False
    seed: int = 0
    where: Callable[[int], str] = field(default=lambda number: "data.path", compare=False)
    add_tokens: Sequence[str] = ()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DatasetSpec:
        """The rows that a run of this recipe trains on. Raises UserError where it names none."""
        if not recipe.data.sources:
            fix = "type data.path=/the/right/path"
            raise UserError("the recipe names no rows", recipe.where("data.path"), fix)
        model, classify = recipe.model, recipe.model.task == "sequence_classification"
        where, tokens = recipe.where_rows, model.add_tokens or ()
        return cls(recipe.data, model.name_or_path, classify, recipe.seed, where, tokens)

    @property
    def date(self) -> date:
        """What chat templates take for today."""
        return date.fromisoformat(self.data.date) if self.data.date else date.today()

    def encoder(self, tokenizer: Any) -> Encoder:
        """What makes its rows."""
        return Encoder(tokenizer, self.data, stop_ids(tokenizer, self.model), self.date)

    def path(self) -> Path:
        """The file that keeps the dataset, named by a hash of all that decides what is in it.

        Raises:
            UserError: the data is not there.
        """
        data = self.data
        parts = [
            FORMAT_VERSION,
            *(version(name) for name in ("transformers", "tokenizers")),
            data.model_dump(mode="json", exclude={"path", "mixture", "date"}),
            self.date.isoformat() if writes_date(hub.model_folder(self.model)) else None,
            [source.model_dump(mode="json", exclude={"path", "weight"}) for source in data.sources],
            self.classify,
            self.seed if data.select == "random" else None,
            _hash_model(self.model),
            list(self.add_tokens),
            _hash_model(data.scorer, with_weights=True),
            data.scorer and _how_scored(),
            [_hash_source(source) for source in data.sources],
        ]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return cache_folder("rows") / f"{key}.safetensors"


def _hash_model(model: str | None, with_weights: bool = False) -> list[str] | str | None:
    """What identifies a model's configuration and tokenizer, and its weights."""
    folder = hub.model_folder(model) if model else None
    return model if folder is None else hash_model(folder, with_weights)


def _how_scored() -> list[str | int]:
    """What scores depend on besides the scorer; its dtype depends on the machine."""
    from speft_ds.data.select import IFD_VERSION, MAX_TOKENS, choose_dtype

    return [str(choose_dtype()), IFD_VERSION, MAX_TOKENS]


def _hash_source(source: Source) -> str:
    """What identifies the rows of a source: the bytes of its files, or the version on the hub."""
    if is_hub_dataset(source.path):
        return str(ask_datasets(source, "load_dataset_builder").cache_dir)
    path = Path(source.path)
    if is_pattern(source.path):
        files = [f"{file.name} {hash_file(file)}" for file in source_files(source)]
        return hashlib.sha256("\n".join(files).encode()).hexdigest()
    if not path.is_dir():
        return hash_file(path)
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    lines = [f"{name} {hash_file(path / name)}" for name in names if ".cache" not in name.parts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_cached(path: Path) -> TokenizedDataset | None:
    """A dataset of the cache; None where there is none or it is damaged: then it is made again."""
    try:
        return TokenizedDataset(path) if path.is_file() else None
    except UserError:
        return None


def prepare(
    spec: DatasetSpec, load_tokenizer: Callable[[], Any], log: Callable[[str], None] = print
) -> TokenizedDataset:
    """The dataset, from the cache or made now. Safe when several jobs want it at once.

    Args:
        load_tokenizer: called only where the rows are made now.
        log: takes a line on what is being done.
    Raises:
        UserError: the data is not there, a row cannot be used, no row is left, or the cache is not writable.
    """
    from filelock import FileLock

    if hub.model_folder(spec.model) is None:
        load_tokenizer()  # fetches it: the key goes by its files
    if spec.data.scorer and hub.model_folder(spec.data.scorer) is None:
        from speft_ds.data.select import find_scorer

        find_scorer(spec.data.scorer)  # the same
    for source in spec.data.sources:
        if unread := files_without_split(source):
            log(f"note: {some(unread)} in {source.path} belong to no split, and are not read")
    path = spec.path()
    if cached := find_cached(path):  # in a folder that may be shared, and not writable
        return _told(cached, log)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The rename at the end of writing makes it safe; the lock saves the others from doing the same work.
        with FileLock(path.with_suffix(".lock")):
            if not find_cached(path):
                log(f"tokenising {', '.join(source.path for source in spec.data.sources)}")
                make_dataset(spec, load_tokenizer(), path, log)
    except OSError as error:
        fix = "free space, or set SPEFT_DS_CACHE to a folder on another disk"
        raise UserError(f"cannot write the tokenised rows: {error}", str(path.parent), fix) from error
    return _told(TokenizedDataset(path), log)


def _told(dataset: TokenizedDataset, log: Callable[[str], None]) -> TokenizedDataset:
    for note in dataset.facts["notes"]:
        log(f"note: {note}")
    return dataset


@dataclass
class _SourceRows:
    """What became of the rows of one source.

    Attributes:
        groups: for each row of the source those that it became, one or, of a conversation, several.
    """

    groups: list[list[Row]]
    texts: list[tuple[str, str]]  # (prompt, response), where the selection scores them
    counts: dict[str, int]

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group]


def make_dataset(spec: DatasetSpec, tokenizer: Any, path: Path, log: Callable[[str], None]) -> None:
    """Read, tokenise, select and pack the rows, and write them to `path`; `log` as for `prepare`."""
    data, bad = spec.data, BadRows()
    classes = classes_of(data, bad)
    encoder, numbers = spec.encoder(tokenizer), range(len(data.sources))
    sources = [_tokenize_source(spec, number, encoder, classes, bad, log) for number in numbers]
    bad.check()
    if data.select != "all":
        _select(sources, spec)
    for number, source in enumerate(sources):
        if not source.groups:
            left_out = [f"{n} {what}" for what, n in source.counts.items() if what != "rows" and n]
            what = f"of {source.counts['rows']} rows none is left: {', '.join(left_out)}"
            fix = "data.max_length, data.long_rows, data.empty_rows and data.select_rows leave rows out"
            raise UserError(what, spec.where(number), fix)
    facts = {
        "sources": [source.counts for source in sources],
        "classes": classes.names if classes else None,
        "notes": encoder.notes(),
        "end_of_turn": _ends(sources, tokenizer),
        "samples": [row.as_text(tokenizer) for row in sources[0].rows[:NUM_SAMPLES]],
    }
    write_dataset(path, [s.groups for s in sources], data.max_length if data.packing else None, facts)


def _ends(sources: list[_SourceRows], tokenizer: Any) -> dict[str, int]:
    """The label tokens that rows end with, as text, and how many rows do."""
    ends = Counter(int(row.ids[-1]) for source in sources for row in source.rows if row.loss_mask[-1])
    return {tokenizer.convert_ids_to_tokens(token): number for token, number in ends.most_common(5)}


def classes_of(data: DataConfig, bad: BadRows | None = None) -> Classes | None:
    """The classes that the recipe names or its rows have; None for other formats.

    Args:
        bad: takes the errors of rows that cannot be used, in place of raising the first.
    Raises:
        UserError: see `find_classes`.
    """
    sources = [source for source in data.sources if source.format == "classification"]
    if not sources:
        return None
    if data.labels is not None:
        return Classes.named(data.labels)
    rows = ((*row, source.columns.label) for source in sources for row in iterate_rows(source, bad))
    return find_classes(rows, bad)


def _tokenize_source(
    spec: DatasetSpec,
    number: int,
    encoder: Encoder,
    classes: Classes | None,
    bad: BadRows,
    log: Callable[[str], None],
) -> _SourceRows:
    source, done = spec.data.sources[number], _SourceRows([], [], dict.fromkeys(COUNTED, 0))
    bar = tqdm(iterate_rows(source, bad), desc=source.path, unit=" rows", disable=not sys.stderr.isatty())
    rows = _with_time_left(bar, source, log)
    for _, example, encoded in encode_rows(rows, source, spec, encoder, classes, bad):
        done.counts["rows"] += 1
        group = []
        for row, change, end in encoded:
            if change:
                done.counts[change] += 1
            if row is not None:
                # A list of Python integers would take nine times the memory.
                ids, loss_mask = np.asarray(row.ids, np.int32), np.asarray(row.loss_mask)
                group.append(replace(row, ids=ids, loss_mask=loss_mask))
                if spec.data.select == "ifd":
                    done.texts.append(_prompt_and_response(example, end))
        done.groups += [group] if group else []
    if not done.counts["rows"] and not bad.errors:
        raise UserError(f"{source.path} has no rows", spec.where(number), "write at least one row into it")
    return done


def _with_time_left(rows: tqdm, source: Source, log: Callable[[str], None]) -> Located:
    """The rows of a bar; where they take long, it says how long the others will, or a line does."""
    start, is_told = time.monotonic(), False
    for done, row in enumerate(rows, 1):
        yield row
        seconds = time.monotonic() - start
        if not is_told and seconds >= PART_S:
            is_told = True
            rows.total = sum(1 for _ in iterate_rows(source, BadRows()))  # reading them alone is quick
            left = f"about {duration(seconds * (rows.total - done) / done)} left"
            if rows.disable:
                log(f"{source.path}: {done:,} of {rows.total:,} rows, {left}")


def encode_rows(
    rows: Located, source: Source, spec: DatasetSpec, encoder: Encoder, classes: Classes | None, bad: BadRows
) -> Iterator[tuple[str, Example | None, list[Encoded]]]:
    """For each row where it stands, its example, and what it became: with what was done, one of COUNTED.

    A row that is left out has no tokens; an empty one, or one that was there before, no example. A
    conversation may become several rows.

    Args:
        bad: takes the errors of rows that cannot be used. Where there are some, nothing more is tokenised.
    Raises:
        UserError: the rows cannot be read, or the tokenizer cannot be used for them.
    """
    for batch in batches(_make_examples(rows, source, spec, encoder, classes, bad)):
        examples = [(where, found) for where, found in batch if isinstance(found, Example)]
        encoded = iter(encoder.encode(examples, bad))
        for where, found in batch:
            if isinstance(found, Example):
                yield where, found, next(encoded)
            else:
                yield where, None, [Encoded(None, found)]


def _make_examples(
    rows: Located, source: Source, spec: DatasetSpec, encoder: Encoder, classes: Classes | None, bad: BadRows
) -> Iterator[tuple[str, Example | str]]:
    """Where each row stands, and its example or, of one that is left out, why."""
    ids, placeholders = RowIds(encoder.said), Placeholders(encoder.said)
    for where, row in rows:
        if ids.is_duplicate(row, where):
            yield where, DUPLICATE
            continue
        try:
            example = make_example(row, where, source, classes, spec.classify)
            if source.format != "classification":
                placeholders.look_at(example, where)
            yield where, example
        except EmptyRow as error:
            if spec.data.empty_rows == "drop":
                yield where, EMPTY
            else:
                bad.add(error)
        except UserError as error:
            bad.add(error)


def left_out_rows(spec: DatasetSpec, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Where each row stands that is left out, and why; but for those that `data.select` does not take.

    Reads and tokenises the rows once more: a dataset in the cache does not know the names of its files.

    Raises:
        UserError: a row that cannot be used.
    """
    bad = BadRows()
    classes, encoder = classes_of(spec.data, bad), spec.encoder(tokenizer)
    for source in spec.data.sources:
        for where, _, encoded in encode_rows(iterate_rows(source, bad), source, spec, encoder, classes, bad):
            yield from ((where, made.change) for made in encoded if made.row is None)
    bad.check()


def _prompt_and_response(example: Example, end: int) -> tuple[str, str]:
    *before, last = (_written(turn) for turn in example.turns[: end + 1])
    return "".join(text + "\n" for text in before), last


def _written(turn: dict) -> str:
    """What a scorer reads of a turn."""
    content, calls = turn.get("content") or "", turn.get("tool_calls")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return text + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _select(sources: list[_SourceRows], spec: DatasetSpec) -> None:
    """Keep the rows that `data.select` takes of all sources together."""
    from speft_ds.data.select import select_rows  # late: it imports torch

    rows = [row for source in sources for row in source.rows]
    texts = [text for source in sources for text in source.texts]
    chosen, numbers = select_rows(rows, texts, spec.data, spec.seed), count()
    for source in sources:
        num_rows = len(source.rows)
        kept = [[row for row in group if next(numbers) in chosen] for group in source.groups]
        source.groups = list(filter(None, kept))
        source.counts[NOT_SELECTED] = num_rows - len(source.rows)
