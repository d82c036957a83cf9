"""Conversations, the rows that they become, and checks of the text of a row."""

from speft_ds.config.data_config import DataConfig
from speft_ds.data.formats import Classes, Example, make_example
from speft_ds.data.tokenize import Encoder

PROMPT, RESPONSE = "what is the answer?", "the quick brown fox, 42 times"
TURNS = [
    ("system", "please say yes"),
    ("user", "what is the question?"),
    ("assistant", "the lazy dog"),
    ("user", "is it red or blue?"),
    ("assistant", "green, hello world"),
]


def encode(tokenizer, example, max_length=1000, long_rows="drop"):
    """The row of one example and what was done to it."""
    (encoded,) = Encoder(tokenizer, max_length, long_rows).encode([("here", example)])
    return encoded


def row_of(tokenizer, row, classify=False, **data):
    """The row of one row of a data set."""
    source = DataConfig(path="x.jsonl", **data).sources[0]
    classes = Classes.named(["no", "yes"]) if source.format == "classification" else None
    return encode(tokenizer, make_example(row, "here", source, classes, classify))[0]


def chat(turns, label=None):
    return Example([{"role": role, "content": text} for role, text in turns], True, label)


def plain(prompt, response):
    return Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], False)


def text_of(tokenizer, ids):
    """The ids as text, without the space that SentencePiece puts before every text."""
    bos = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""
    return bos + tokenizer.decode(ids[1:] if bos else ids)


def check(tokenizer, row, pieces):
    """The row is these pieces of text, (text, whether learnt) each; what is learnt ends with the EOS."""
    assert text_of(tokenizer, row.ids) == "".join(text for text, _ in pieces)
    ends, text = [], ""
    for piece, learnt in pieces:
        if learnt:  # as text up to where the span starts and stops: some decoders drop a first space
            ends += [(text, text + piece)]
        text += piece
    spans = [tuple(text_of(tokenizer, row.ids[:edge]) for edge in span) for span in row.spans]
    assert spans == ends
    assert row.ids[-1] == tokenizer.eos_token_id and row.spans[-1][1] == len(row.ids)
    assert row.num_labels == sum(stop - start for start, stop in row.spans) > 0


def check_bos(style, tokenizer, row, count=1):
    if style.bos is None:
        return
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.bos_token_id) == count
