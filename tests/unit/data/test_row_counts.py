"""What became of the rows: counted by hand."""

import pytest

from speft_ds.data.dataset_cache import DatasetSpec, left_out_rows, prepare
from speft_ds.data.row_counts import in_words, row_counts
from unit.data.made import make, pairs, refusal, without_chat, write

ROWS = [*pairs("one", "", "two", "x" * 90), *pairs("three", prompt=""), *pairs("y" * 90, "four")]


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def test_rows_are_counted_by_what_became_of_them(rows, model):
    data = without_chat(rows, max_length=16, empty_rows="drop")
    dataset = make(data, model)
    counts = row_counts(dataset, 2.5)
    labels = sum(len(text) + 1 for text in ("one", "two", "four"))  # a token per byte, and the end
    assert counts == {
        "rows_read": 7, "left_out": {"empty": 2, "too long": 2}, "truncated": {}, "rows": 3, "packs": None,
        "label_tokens": labels, "epochs": 2.5,
    }  # fmt: skip
    assert counts["rows_read"] == counts["rows"] + sum(counts["left_out"].values())
    words = in_words(counts)
    assert all(
        text in words for text in ("7 read", "4 left out", "2 empty", "2 too long", "3 trained", "2.5")
    )


def test_cut_packed_and_selected_rows(rows, model):
    data = without_chat(rows, max_length=16, empty_rows="drop", long_rows="truncate_response")
    counts = row_counts(make(data.model_copy(update={"packing": True}), model), 1)
    assert counts["truncated"] == {"truncated response": 2} and counts["rows"] == 5 and counts["packs"] < 5
    chosen = data.model_copy(update={"select": "longest", "select_rows": 2})
    counts = row_counts(make(chosen, model), 1)
    assert counts["left_out"] == {"empty": 2, "not selected": 3} and counts["rows"] == 2
    classes = write(rows.parent / "labels.jsonl", [{"text": t, "label": t} for t in ("a", "b", "b")])
    spec = without_chat(classes, format="classification")
    assert row_counts(make(spec, model, classify=True), 1)["label_tokens"] == 3


def test_rows_that_are_left_out_are_named(tmp_path, rows, model, tokenizers):
    import tiny

    other = write(tmp_path / "other.jsonl", ROWS[3:])
    data = without_chat(tmp_path / "*.jsonl", max_length=16, empty_rows="drop")
    found = [where for where, _ in left_out_rows(DatasetSpec(data, model), tiny.make_tokenizer())]
    assert found == [f"{other}:{n}" for n in (1, 2, 3)] + [f"{rows}:{n}" for n in (2, 4, 5, 6)]
    with refusal(f"{rows}:2"):
        list(left_out_rows(DatasetSpec(without_chat(rows), model), tiny.make_tokenizer()))


def test_a_file_that_is_in_no_split_is_told_at_every_start(tmp_path, model):
    import tiny

    for name in ("train", "test", "more"):
        write(tmp_path / "rows" / f"{name}.jsonl", pairs("a"))
    for _ in range(2):  # made, then from the cache
        lines = []
        prepare(DatasetSpec(without_chat(tmp_path / "rows"), model), tiny.make_tokenizer, lines.append)
        assert len([line for line in lines if "more.jsonl" in line and "test.jsonl" not in line]) == 1


def test_files_that_a_pattern_fits_are_part_of_the_key(tmp_path, model):
    data, keys = without_chat(tmp_path / "rows" / "*.jsonl"), set()
    for name, response in (("a", "1"), ("a", "2"), ("b", "3")):
        write(tmp_path / "rows" / f"{name}.jsonl", pairs(response))
        keys.add(DatasetSpec(data, model).path())
    assert len(keys) == 3
    write(tmp_path / "rows" / "c.csv", [])
    assert DatasetSpec(data, model).path() in keys
