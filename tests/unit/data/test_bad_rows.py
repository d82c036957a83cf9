"""Rows that cannot be used: all are named, whatever is wrong with them and wherever they stand."""

import json
import re

import pytest
import tiny

from speft_ds.config.data_config import DataConfig
from speft_ds.data import bad_rows
from speft_ds.data.dataset_cache import DatasetSpec, left_out_rows
from speft_ds.errors import UserError
from unit.data.made import make, pairs, without_chat, write

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def refused(data, model):
    with pytest.raises(UserError) as caught:
        make(data, model)
    return caught.value


def places(error):
    """Where the rows stand that an error names, by line."""
    return [int(number) for number in re.findall(r"rows\.\w+:(\d+)", error.what)]


def test_every_bad_row_is_named_at_once(tmp_path, model):
    lines = ['{"prompt": "a", "response": "b"}'] * 12
    bad = {
        2: "{",
        4: '{"prompt": "a"}',
        6: '{"prompt": "a", "response": ""}',
        9: "[1]",
        12: '{"a": 1, "a": 2}',
    }
    for number, line in bad.items():
        lines[number - 1] = line
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    error = refused(without_chat(path), model)
    assert sorted(places(error)) == [*bad] and "5 rows" in error.what and error.fix
    with pytest.raises(UserError) as caught:
        list(left_out_rows(DatasetSpec(without_chat(path), model), tiny.make_tokenizer()))
    assert caught.value.what == error.what
    path.write_text("\n".join(lines[:2]))  # one alone is shown with what to type for it
    assert refused(without_chat(path), model).where == f"{path}:2"


def test_lines_of_a_table_and_what_the_template_refuses(tmp_path, model):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response\na,b\na\na,b,c\na,"b"c\na,b\n')
    assert sorted(places(refused(without_chat(path), model))) == [3, 4, 5]
    turns = [TALK, [{"role": "critic", "content": "a"}, TALK[1]], TALK, [*TALK, TALK[1]], TALK]
    path = write(tmp_path / "rows.jsonl", [{"messages": talk} for talk in turns])
    data = DataConfig(path=str(path), format="messages")
    template = (
        tiny.CHAT_TEMPLATE + "{% if messages[0].role == 'critic' %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        make(data, model, load=lambda: tokenizer)
    assert sorted(places(caught.value)) == [2, 4]


def test_labels_that_are_none(tmp_path, model):
    rows = [{"text": "a", "label": label} for label in ("x", [1], "y", {"a": 1}, "x")]
    path = write(tmp_path / "rows.jsonl", rows)
    assert places(refused(without_chat(path, format="classification"), model)) == [2, 4]


def test_many_are_counted_and_too_many_end_the_reading(tmp_path, model, monkeypatch):
    path = write(tmp_path / "rows.jsonl", pairs(*[""] * 30))
    error = refused(without_chat(path), model)
    assert places(error) == [1, 2, 3] and "30 rows" in error.what and "27 more" in error.what
    monkeypatch.setattr(bad_rows, "MOST", 25)
    assert "25 rows or more" in refused(without_chat(path), model).what


def test_what_is_wrong_with_the_model_is_not_said_of_every_row(tmp_path, model):
    path = write(tmp_path / "rows.jsonl", [{"messages": TALK}] * 3)
    data = DataConfig(path=str(path), format="messages", chat_template_kwargs={"thinks": True})
    assert refused(data, model).where == "data.chat_template_kwargs"


def test_a_row_that_is_there_twice(tmp_path, model):
    rows = [{"Ticket ID": n, **row} for n, row in enumerate(pairs("a", "b", "c"))]
    other = {**rows[0], "response": "z"}  # one id, and another answer: who knows which is right
    path = write(tmp_path / "rows.jsonl", [*rows, rows[1], other, {**rows[1], "Ticket ID": 7}])
    dataset = make(without_chat(path), model)
    assert dataset.num_rows == 5 and dataset.facts["sources"][0]["duplicate id, left out"] == 1
    found = list(left_out_rows(DatasetSpec(without_chat(path), model), tiny.make_tokenizer()))
    assert found == [(f"{path}:4", "duplicate id, left out")]
    # Without an id, it may be so on purpose.
    write(path, [*pairs("a"), *pairs("a"), {**rows[0], "Ticket ID": None}, {**rows[0], "Ticket ID": None}])
    assert make(without_chat(path), model).num_rows == 4


@pytest.mark.parametrize("name", ["id", "ID", "row_id", "ticketId", "uuid", "Ticket ID"])
def test_names_of_ids(tmp_path, model, name):
    path = write(tmp_path / "rows.jsonl", [{name: "x", **row} for row in pairs("a", "a")])
    assert make(without_chat(path), model).num_rows == 1


@pytest.mark.parametrize("name", ["grid", "Idea", "valid", "hybrid"])
def test_names_that_only_end_like_ids(tmp_path, model, name):
    path = write(tmp_path / "rows.jsonl", [{name: "x", **row} for row in pairs("a", "a")])
    assert make(without_chat(path), model).num_rows == 2


def test_different_rows_of_one_id_are_told(tmp_path, model):
    rows = [
        {"id": number, **row} for number, row in zip([1, 2, 1, "1"], pairs("a", "b", "c", "d"), strict=True)
    ]
    lines = []
    path = write(tmp_path / "rows.jsonl", rows)
    assert make(without_chat(path), model, log=lines.append).num_rows == 4
    (told,) = [line for line in lines if f"{path}:3" in line]
    assert f"{path}:1" in told and "2 rows" in told


def test_responses_that_may_stand_for_none_are_told(tmp_path, model):
    path, lines = write(tmp_path / "rows.jsonl", pairs("a", "N/A", "none of them", "NaN ")), []
    assert make(without_chat(path), model, log=lines.append).num_rows == 4
    (told,) = [line for line in lines if f"{path}:2" in line]
    assert "2 responses" in told


def test_ids_are_those_of_one_source(tmp_path, model):
    row = {"id": 1, **pairs("a")[0]}
    mixture = [{"path": str(write(tmp_path / f"{name}.jsonl", [row]))} for name in "ab"]
    data = DataConfig.model_validate({"mixture": mixture, "chat_template": False})
    assert make(data, model).num_rows == 2
    assert json.dumps(make(data, model).facts["sources"]).count('"rows": 1') == 2
