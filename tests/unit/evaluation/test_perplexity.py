"""The general text whose perplexity is measured."""

import json

import pytest

from speft_ds.errors import UserError
from speft_ds.evaluation.perplexity import read_text

ROWS = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in ("one", "two\u2028lines", "three"))


@pytest.mark.parametrize(
    ("name", "content", "num_bytes", "text"),
    [
        ("a.txt", "äöü and more", 3, "ä"),  # cut at a character
        ("a.txt", "äöü and more", 100, "äöü and more"),
        ("a.jsonl", ROWS, 100, "one\ntwo\u2028lines\nthree"),
        ("a.jsonl", ROWS, 5, "one\nt"),
    ],
)
def test_the_beginning_of_a_text_or_of_rows(tmp_path, name, content, num_bytes, text):
    (tmp_path / name).write_text(content)
    assert read_text(tmp_path / name, num_bytes) == text


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n"), ("a.jsonl", "no json"), ("a.jsonl", '{"no": 1}')]
)
def test_what_is_no_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name) as caught:
        read_text(tmp_path / name, 100)
    assert caught.value.where == "eval.forgetting_text" and caught.value.fix
