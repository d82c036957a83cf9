"""Rows, conversations and datasets that the tests of this folder make."""

import csv
import gzip
import json
from contextlib import contextmanager
from itertools import groupby

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from speft_ds.config.data_config import DataConfig
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.data.formats import Example
from speft_ds.data.tokenize import Encoder
from speft_ds.errors import UserError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda text: pyarrow.compress(text, "zstd", asbytes=True),
}
ROWS = [
    {"prompt": "one", "response": 'say "two",\nthree'},
    {"prompt": "\u4e16\u754c \U0001f98a", "response": "a\u2028b\u2029c\x85d\x0be"},
    {"prompt": "  ", "response": "tab\tand back\\slash, {braces}"},
    {"prompt": "long", "response": "word " * 40_000},
]


@contextmanager
def refusal(where, *fixes, what=""):
    """The block raises a UserError for this place, with these words in what to type and in what is wrong."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.where == (where and str(where)) and caught.value.fix
    assert all(fix in caught.value.fix for fix in fixes), caught.value.fix
    assert what in caught.value.what, caught.value.what


def make(data, model, load=tiny.make_tokenizer, log=lambda line: None, **options):
    return prepare(DatasetSpec(data, model, **options), load, log)


def without_chat(path, **data):
    """A data section without a chat template: one token per byte, and one for the end."""
    return DataConfig(path=str(path), chat_template=False, **data)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_kind(path, rows, kind):
    """The rows in a file of a kind, by the kind's own writer; compressed as its suffix says."""
    plain = path.parent.parent / f"plain.{kind}"
    if kind == "jsonl":
        write(plain, rows)
    elif kind == "json":
        plain.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](plain.read_bytes()))
    return path


def source(path, **data):
    return DataConfig(path=str(path), **data).sources[0]


def pairs(*responses, prompt="p"):
    return [{"prompt": prompt, "response": response} for response in responses]


def shown(dataset):
    """The rows as text, with a bar where the loss mask changes."""
    tokenizer = tiny.make_tokenizer()
    return ["|".join(text for text, _ in row.as_text(tokenizer)) for row in dataset]


def responses(row):
    """[start, stop) of the label tokens."""
    runs, start = [], 0
    for is_label, tokens in groupby(row.loss_mask):
        stop = start + len(list(tokens))
        runs += [(start, stop)] if is_label else []
        start = stop
    return runs


def encode(tokenizer, example, max_length=1000, long_rows="drop"):
    """The row of one example and what was done to it."""
    data = DataConfig(max_length=max_length, long_rows=long_rows)
    (((row, change, _),),) = Encoder(tokenizer, data).encode([("here", example)])
    return row, change


def chat(turns, is_chat=True, label=None):
    return Example([{"role": role, "content": text} for role, text in turns], is_chat, label)


def plain(prompt, response):
    return chat([("user", prompt), ("assistant", response)], is_chat=False)
