"""What is in a dataset: rows, packs, classes, and what became of the rows that were read."""

from functools import partial

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.config.data_config import Columns, DataConfig, Source
from speft_ds.data.dataset import Row, first_fit, pack, pack_groups
from speft_ds.data.tokenize import batches
from unit.data.made import make, pairs, refusal, shown, without_chat, write


def test_rows_are_those_tokenised_by_hand(path, model):
    dataset = make(DataConfig(path=str(path)), model)
    rows = tiny.read_rows(path)
    assert list(dataset) == rows and len(dataset) == dataset.num_rows == 30
    assert list(dataset.rows()) == rows and [dataset[n] for n in (17, 3)] == [rows[n] for n in (17, 3)]
    assert dataset.lengths.tolist() == [len(row.ids) for row in rows]
    assert dataset.num_label_tokens.tolist() == [row.num_labels for row in rows]
    assert dataset.sizes == dataset.row_sizes == (30,) and not dataset.is_packed
    for number in (30, -1):
        with pytest.raises(IndexError):
            dataset[number]
    samples = dataset.facts["samples"]
    assert samples[1] == [["<s>say bear please </s><s>", False], ["bear 1</s>", True]] and len(samples) == 3
    held = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert sum(array.size for array in held) < sum(dataset.lengths)  # the ids stay in the file
    assert {type(value) for value in (*dataset[3].ids, *dataset[3].loss_mask)} == {int, bool}


def test_packs_hold_every_row_once(path, model):
    dataset = make(DataConfig(path=str(path), packing=True, max_length=64), model)
    rows = tiny.read_rows(path)
    packs = naive_first_fit([len(row.ids) for row in rows], 64)
    assert dataset.is_packed and len(dataset) == len(packs) < 30 and dataset.num_rows == 30
    assert dataset.sizes == (len(packs),) and dataset.row_sizes == (30,)
    assert list(dataset) == [pack([rows[n] for n in numbers]) for numbers in packs]
    assert list(dataset.rows()) == rows and dataset.rows().sizes == (30,)  # each by itself, for calibration


def test_a_pack_is_its_rows_one_after_the_other():
    rows = [Row([5, 6, 7], [0, 1, 1]), Row([8], [0]), Row([9, 10, 11, 12], [0, 1, 0, 1])]
    packed = pack(rows)
    assert packed == Row([5, 6, 7, 8, 9, 10, 11, 12], [0, 1, 1, 0, 0, 1, 0, 1], [0, 3, 4])
    assert packed.num_labels == sum(row.num_labels for row in rows) == 4
    assert pack(rows[:1]) == rows[0]


def naive_first_fit(lengths, capacity):
    packs = []
    for number, length in enumerate(lengths):
        for numbers in packs:
            if sum(lengths[n] for n in numbers) + length <= capacity:
                break
        else:
            packs.append(numbers := [])
        numbers.append(number)
    return packs


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=60), st.just(n))))
def test_each_row_goes_into_the_first_pack_with_room(case):
    lengths, capacity = case
    assert first_fit(lengths, capacity) == naive_first_fit(lengths, capacity)


lengths_of_talks = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), max_size=20)


@given(lengths_of_talks)
def test_the_rows_of_a_conversation_share_a_pack_or_have_packs_of_their_own(talks):
    together = pack_groups(talks, 9)
    lengths = [length for talk in talks for length in talk]
    packs = [pack for some in together for pack in some]
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(pack and sum(lengths[row] for row in pack) <= 9 for pack in packs)
    first = 0
    for talk in talks:
        rows = [*range(first, first + len(talk))]
        first += len(talk)
        touched = [pack for some in together for pack in some if set(pack) & set(rows)]
        (own,) = (some for some in together if any(pack in some for pack in touched))
        own = [pack for pack in own if pack in touched]
        assert [row for pack in own for row in pack if row in rows] == rows  # together and in order
        assert len(own) == 1 or sum(talk) > 9
        if len(own) > 1:  # others only behind it
            assert [row for pack in own for row in pack][: len(rows)] == rows
    assert pack_groups([[length] for length in lengths], 9) == [[p] for p in naive_first_fit(lengths, 9)]


def test_a_mixture_keeps_its_sources_apart(tmp_path, path, model):
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}, {"q": "e", "a": " "}]
    other = write(tmp_path / "other.jsonl", rows)
    columns = Columns(prompt="q", response="a")
    mixture = [Source(path=str(path)), Source(path=str(other), columns=columns, chat_template=False)]
    dataset = make(DataConfig(mixture=mixture, empty_rows="drop"), model)
    assert dataset.sizes == dataset.row_sizes == (30, 2)
    assert list(dataset)[:30] == tiny.read_rows(path) and shown(dataset)[30:] == ["a|b</s>", "c|d</s>"]
    assert [counts["rows"] for counts in dataset.facts["sources"]] == [30, 3]
    assert [counts["empty, left out"] for counts in dataset.facts["sources"]] == [0, 1]
    packed = make(DataConfig(mixture=mixture, empty_rows="drop", packing=True, max_length=64), model)
    assert packed.row_sizes == (30, 2) and packed.sizes[1] == 1 and sum(packed.sizes) == len(packed)
    assert packed[len(packed) - 1].starts == [0, 3]  # no pack has rows of two sources


def test_rows_to_classify(tmp_path, model):
    rows = [{"text": t, "label": label} for t, label in zip("abc", "yny", strict=True)]
    data = without_chat(write(tmp_path / "rows.jsonl", rows), format="classification")
    dataset = make(data, model, classify=True)
    assert [row.label for row in dataset] == [1, 0, 1] and dataset.facts["classes"] == ["n", "y"]
    assert not any(any(row.loss_mask) for row in dataset) and dataset[0].num_labels == 1
    assert shown(make(data, model)) == ["a|y</s>", "b|n</s>", "c|y</s>"]  # for a language model
    named = make(data.model_copy(update={"labels": ["y", "n"]}), model, classify=True)
    assert [row.label for row in named] == [0, 1, 0]


def test_classes_are_found_over_all_sources_whatever_their_columns(tmp_path, model):
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": None}])
    two = write(tmp_path / "two.jsonl", [{"text": "c", "kind": "w", "label": 5}])
    mixture = [Source(path=str(one)), Source(path=str(two), columns=Columns(label="kind"))]
    data = DataConfig(mixture=mixture, format="classification", empty_rows="drop")
    dataset = make(data, model, classify=True)
    assert dataset.facts["classes"] == ["w", "x"] and [row.label for row in dataset] == [1, 0]
    with refusal(f"{one}:2", "data.empty_rows=drop"):
        make(data.model_copy(update={"empty_rows": "refuse"}), model, classify=True)


def test_what_became_of_the_rows_is_counted(tmp_path, model):
    rows = [*pairs("yes", "", "y" * 100), {"prompt": "p" * 100, "response": "no"}]
    data = without_chat(write(tmp_path / "rows.jsonl", rows), empty_rows="drop", max_length=40)
    for long_rows, counted, expected in (
        ("drop", {"too long, left out": 2}, ["p|yes</s>"]),
        ("truncate_prompt", {"truncated prompt": 1, "too long, left out": 1}, None),
        ("truncate_response", {"truncated response": 1, "too long, left out": 1}, None),
    ):
        dataset = make(data.model_copy(update={"long_rows": long_rows}), model)
        (counts,) = dataset.facts["sources"]
        assert {what: n for what, n in counts.items() if n} == {"rows": 4, "empty, left out": 1, **counted}
        assert expected is None or shown(dataset) == expected
    assert shown(dataset) == ["p|yes</s>", "p|" + "y" * 39]
    texts = write(tmp_path / "rows.jsonl", [{"text": "</s>"}, {"text": "ab"}])
    dataset = make(without_chat(texts, format="text"), model)
    assert shown(dataset) == ["a|b</s>"] and dataset.facts["sources"][0]["nothing to learn, left out"] == 1


def test_no_row_left(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", pairs("", "y" * 100))
    data = without_chat(path, empty_rows="drop", max_length=40)
    with refusal("mine.yaml:0", "data.max_length", "data.empty_rows", what="2 rows"):
        make(data, model, where=lambda number: f"mine.yaml:{number}")
    with refusal("data.path"):
        make(without_chat(write(tmp_path / "none.jsonl", [])), model)
    with refusal(f"{path}:1", "data.empty_rows=drop"):
        make(without_chat(path), model)


def test_more_rows_than_are_tokenised_at_once(tmp_path, model, monkeypatch):
    path = write(tmp_path / "rows.jsonl", pairs(*(f"row {n}" for n in range(25))))
    at_once = make(without_chat(path), model)
    monkeypatch.setattr("speft_ds.data.dataset_cache.batches", partial(batches, num_characters=20))
    parts = make(without_chat(path, max_length=100), model)
    assert parts.path != at_once.path and list(parts) == list(at_once) and len(parts) == 25


def test_the_rows_of_conversations_stay_in_order_and_are_told(tmp_path, model):
    talks = [
        {"conversations": [{"from": ("human", "gpt")[n % 2], "value": f"{c}{n}"} for n in range(2 * c)]}
        for c in (1, 2, 3)
    ]
    path = write(tmp_path / "talks.jsonl", talks)
    lines = []
    dataset = make(
        DataConfig(path=str(path), turns="each", select="longest", select_rows=6), model, log=lines.append
    )
    asked = [text.split("<s>")[-2].removesuffix("</s>") for text in map("".join, rows_of_text(dataset))]
    assert asked == ["10", "20", "22", "30", "32", "34"]
    assert dataset.facts["sources"][0]["rows"] == 3 and dataset.facts["end_of_turn"] == {"</s>": 6}
    notes = dataset.facts["notes"]
    assert any("ShareGPT" in note and "3 rows" in note for note in notes)
    assert any("2 conversations" in note and "5 rows" in note for note in notes)
    assert all(any(note in line for line in lines) for note in notes)
    again = []
    make(DataConfig(path=str(path), turns="each", select="longest", select_rows=6), model, log=again.append)
    assert again == lines[-len(notes) :]  # a start from the cache says them, too


@pytest.mark.parametrize("packing", [False, True])
def test_conversations_in_a_weighted_mixture(tmp_path, path, model, packing):
    def talk(turns):
        return {
            "messages": [{"role": ("user", "assistant")[n % 2], "content": "x" * 9} for n in range(turns)]
        }

    write(tmp_path / "talks.jsonl", [talk(2 * n) for n in (1, 4, 2, 7)])
    mixture = [
        Source(path=str(path), weight=3),
        Source(path=str(tmp_path / "talks.jsonl"), format="messages", weight=1),
    ]
    data = DataConfig(mixture=mixture, turns="each", packing=packing, max_length=256)
    dataset = make(data, model)
    assert dataset.row_sizes == (30, 14)
    order = dataset.order(data.weights, 5)
    epochs = [[dataset[number] for number in order.epoch(epoch)] for epoch in range(3)]
    # A conversation counts once, whatever it became; one pack may have several.
    assert order.shares == [12, 4] and sum(order.counts) == 34
    assert dataset.num_packs(256) <= len(dataset) if packing else len(epochs[0]) == 12 + 14
    later = [row for epoch in epochs for row in epoch][5:]
    assert [dataset[number] for number in dataset.order(data.weights, 5).ids(5, len(later))] == later


def rows_of_text(dataset):
    tokenizer = tiny.make_tokenizer()
    return [[text for text, _ in row.as_text(tokenizer)] for row in dataset]
