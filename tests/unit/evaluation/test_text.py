"""The general text whose perplexity is measured."""

import json

import pytest

from speft_ds.errors import UserError
from speft_ds.evaluation.perplexity import read_text


def test_the_beginning_of_a_text_is_cut_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("äöü and more")
    assert read_text(tmp_path / "a.txt", 3) == "ä"
    assert read_text(tmp_path / "a.txt", 100) == "äöü and more"


def test_rows_are_paragraphs(tmp_path):
    rows = [{"text": "one"}, {"text": "two\u2028lines"}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert read_text(tmp_path / "a.jsonl", 100) == "one\ntwo\u2028lines\nthree"
    assert read_text(tmp_path / "a.jsonl", 5) == "one\nt"


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", " \n"), ("a.jsonl", "no json"), ("a.jsonl", '{"no": 1}')]
)
def test_what_is_no_text_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        read_text(tmp_path / name, 100)
