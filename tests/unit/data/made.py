"""Rows, conversations and datasets that the tests of this folder make."""

import json
from contextlib import contextmanager
from itertools import groupby

import pytest
import tiny

from speft_ds.config.data_config import DataConfig
from speft_ds.data.dataset_cache import DatasetSpec, prepare
from speft_ds.data.formats import Example
from speft_ds.data.tokenize import Encoder
from speft_ds.errors import UserError


@contextmanager
def refusal(where, *fixes, what=""):
    """The block raises a UserError for this place, with these words in what to type and in what is wrong."""
    with pytest.raises(UserError) as caught:
        yield
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
