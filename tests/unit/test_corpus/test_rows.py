"""What is in a corpus: rows, packs, classes, and what became of the rows that were read."""

import numpy as np
import pytest
import tiny

from speft_ds.config.data_config import Columns, DataConfig, Source
from speft_ds.data.dataset import Row
from speft_ds.errors import UserError
from unit.test_corpus.made import make, pairs, plain, shown, write
from unit.test_packing import naive


def test_rows_are_those_tokenised_by_hand(path, model):
    corpus = make(DataConfig(path=str(path)), model)
    rows = tiny.read_rows(path)
    assert list(corpus) == rows and len(corpus) == corpus.num_rows == 30
    assert list(corpus.rows()) == rows and [corpus[n] for n in (17, 3, 29)] == [rows[n] for n in (17, 3, 29)]
    assert corpus.lengths.tolist() == corpus.sequence_lengths().tolist() == [len(row.ids) for row in rows]
    assert corpus.num_learnt.tolist() == [row.num_labels for row in rows]
    assert corpus.sizes == corpus.row_sizes == (30,) and not corpus.is_packed
    for number in (30, -1):
        with pytest.raises(IndexError):
            corpus[number]


def test_packs_hold_every_row_once(path, model):
    corpus = make(DataConfig(path=str(path), packing=True, max_length=64), model)
    rows = tiny.read_rows(path)
    packs = naive([len(row.ids) for row in rows], 64)
    assert corpus.is_packed and len(corpus) == len(packs) < 30 and corpus.num_rows == 30
    assert corpus.sizes == (len(packs),) and corpus.row_sizes == (30,)
    for pack, numbers in zip(corpus, packs, strict=True):
        starts = [sum(len(rows[n].ids) for n in numbers[:i]) for i in range(len(numbers))]
        assert pack.starts == starts
        assert pack.ids == [token for n in numbers for token in rows[n].ids]
        spans = [
            (start + a, start + b) for start, n in zip(starts, numbers, strict=True) for a, b in rows[n].spans
        ]
        assert pack.spans == spans
    assert corpus.sequence_lengths().tolist() == [len(pack.ids) for pack in corpus]
    assert list(corpus.rows()) == rows  # each by itself, for calibration


def test_a_mixture_keeps_its_sources_apart(tmp_path, path, model):
    other = write(
        tmp_path / "other.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}, {"q": "e", "a": " "}]
    )
    columns = Columns(prompt="q", response="a")
    mixture = [Source(path=str(path)), Source(path=str(other), columns=columns, chat_template=False)]
    corpus = make(DataConfig(mixture=mixture, empty_rows="drop"), model)
    assert corpus.sizes == corpus.row_sizes == (30, 2)
    assert list(corpus)[:30] == tiny.read_rows(path) and shown(corpus)[30:] == ["a|b</s>|", "c|d</s>|"]
    assert [counts["rows"] for counts in corpus.facts["sources"]] == [30, 3]
    assert [counts["empty, left out"] for counts in corpus.facts["sources"]] == [0, 1]
    packed = make(DataConfig(mixture=mixture, empty_rows="drop", packing=True, max_length=64), model)
    assert packed.row_sizes == (30, 2) and packed.sizes[1] == 1 and sum(packed.sizes) == len(packed)
    assert packed[len(packed) - 1].starts == [0, 3]  # no pack has rows of two sources


def test_rows_to_classify(tmp_path, model):
    path = write(
        tmp_path / "rows.jsonl", [{"text": t, "label": label} for t, label in zip("abc", "yny", strict=True)]
    )
    data = plain(path, format="classification")
    corpus = make(data, model, classify=True)
    assert [row.label for row in corpus] == [1, 0, 1] and corpus.facts["classes"] == ["n", "y"]
    assert [row.spans for row in corpus] == [[], [], []] and corpus[0].num_labels == 1
    assert shown(make(data, model)) == ["a|y</s>|", "b|n</s>|", "c|y</s>|"]  # for a language model
    named = make(data.model_copy(update={"labels": ["y", "n"]}), model, classify=True)
    assert [row.label for row in named] == [0, 1, 0]


def test_classes_are_found_over_all_sources_whatever_their_columns(tmp_path, model):
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    two = write(tmp_path / "two.jsonl", [{"text": "c", "kind": "w", "label": 5}])
    mixture = [Source(path=str(one)), Source(path=str(two), columns=Columns(label="kind"))]
    data = DataConfig(mixture=mixture, format="classification", empty_rows="drop")
    corpus = make(data, model, classify=True)
    assert corpus.facts["classes"] == ["w", "x"] and [row.label for row in corpus] == [1, 0]
    with pytest.raises(UserError, match=r"(?s)the row has no label.*one.jsonl:2"):
        make(data.model_copy(update={"empty_rows": "refuse"}), model, classify=True)


def test_what_became_of_the_rows_is_counted(tmp_path, model):
    rows = [*pairs("yes", "", "y" * 100), {"prompt": "p" * 100, "response": "no"}]
    data = plain(write(tmp_path / "rows.jsonl", rows), empty_rows="drop", max_length=40)
    zero = {
        "truncated prompt": 0,
        "truncated response": 0,
        "not selected": 0,
        "nothing to learn, left out": 0,
    }
    corpus = make(data, model)
    assert corpus.facts["sources"] == [{"rows": 4, "empty, left out": 1, "too long, left out": 2, **zero}]
    corpus = make(data.model_copy(update={"long_rows": "truncate_prompt"}), model)
    assert corpus.facts["sources"][0]["truncated prompt"] == 1 and len(corpus) == 2
    corpus = make(data.model_copy(update={"long_rows": "truncate_response"}), model)
    assert corpus.facts["sources"][0]["truncated response"] == 1 and len(corpus) == 2
    assert shown(corpus) == ["p|yes</s>|", "p|" + "y" * 39 + "|"]


def test_its_first_rows_are_kept_as_text(path, model):
    samples = make(DataConfig(path=str(path)), model).facts["samples"]
    assert samples[1] == [["<s>say bear please </s><s>", False], ["bear 1</s>", True]] and len(samples) == 3


def test_no_row_left(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", [*pairs("", "y" * 100)])
    data = plain(path, empty_rows="drop", max_length=40)
    with pytest.raises(UserError) as caught:
        make(data, model, where=lambda number: f"mine.yaml:{number}")
    assert caught.value.what == "of 2 rows none is left: 1 empty, left out, 1 too long, left out"
    assert caught.value.where == "mine.yaml:0" and "data.max_length" in caught.value.fix
    with pytest.raises(UserError, match="has no rows"):
        make(plain(write(tmp_path / "none.jsonl", [])), model)
    with pytest.raises(UserError, match=r"(?s)empty 'response'.*rows.jsonl:1.*data.empty_rows=drop"):
        make(plain(path), model)


def test_more_rows_than_are_tokenised_at_once(tmp_path, model, monkeypatch):
    path = write(tmp_path / "rows.jsonl", pairs(*(f"row {n}" for n in range(25))))
    whole = make(plain(path), model)
    monkeypatch.setattr("speft_ds.data.dataset.BATCH", 4)
    parts = make(plain(path, max_length=100), model)
    assert parts.path != whole.path and list(parts) == list(whole) and len(parts) == 25


def test_ids_are_read_row_by_row_from_the_file(path, model):
    corpus = make(DataConfig(path=str(path)), model)
    held = [value for value in vars(corpus).values() if isinstance(value, np.ndarray)]
    assert sum(array.size for array in held) < sum(corpus.lengths)  # edges and spans, not the ids
    assert isinstance(corpus[3], Row) and all(type(token) is int for token in corpus[3].ids)


def test_a_text_of_one_token_has_nothing_to_learn(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", [{"text": "</s>"}, {"text": "ab"}])
    corpus = make(plain(path, format="text"), model)
    assert shown(corpus) == ["a|b</s>|"]
    assert corpus.facts["sources"][0]["nothing to learn, left out"] == 1
