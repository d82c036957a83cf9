"""Rows, data sections and corpora that the tests of corpora make."""

import json
from itertools import pairwise

import tiny
from speft_ds.data.dataset_cache import DatasetSpec, prepare

from speft_ds.config.data_config import DataConfig


def make(data, model, load=tiny.make_tokenizer, say=lambda line: None, **options):
    return prepare(DatasetSpec(data, model, **options), load, say)


def plain(path, **data):
    """A data section without a chat template: one token a byte, and one for the end."""
    return DataConfig(path=str(path), chat_template=False, **data)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(*responses, prompt="p"):
    return [{"prompt": prompt, "response": response} for response in responses]


def shown(corpus):
    """The rows as text, the start of what is learnt marked."""
    tokenizer = tiny.make_tokenizer()
    texts = []
    for row in corpus:
        edges = [0, *(edge for span in row.spans for edge in span), len(row.ids)]
        texts.append("|".join(tokenizer.decode(row.ids[a:b]) for a, b in pairwise(edges)))
    return texts
