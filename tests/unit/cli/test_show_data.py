"""`speft data`: what the rows of a recipe look like to the model."""

import json

import pytest
import tiny as made
import yaml

from unit.commands import run


@pytest.mark.parametrize("packing", [False, True])
def test_rows_lengths_and_steps_are_shown(tiny, tmp_path, capsys, monkeypatch, packing):
    values = made.recipe_values(tiny, data={"packing": packing})
    recipe, picture = tmp_path / "mine.yaml", tmp_path / "data.png"
    recipe.write_text(yaml.safe_dump(values))
    assert run(monkeypatch, "data", str(recipe), "--output", str(picture)) == 0
    out, rows = capsys.readouterr().out, made.read_rows(tiny["data"])
    tokens, labels = sum(len(row.ids) for row in rows), sum(row.num_labels for row in rows)
    assert f"48 rows, {tokens:,} tokens; {labels:,} of them label tokens" in out
    assert "<s>say ant </s><s>[[ant 0</s>]]" in out and "4 steps of 8" in out
    assert ("packs" in out) == packing
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_conversations_are_taken_for_is_said(tiny, tmp_path, capsys, monkeypatch):
    talk = [("human", "hello"), ("gpt", "ant"), ("human", "more"), ("gpt", "bear")]
    row = {"conversations": [{"from": role, "value": text, "mood": "glad"} for role, text in talk]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(made.recipe_values(tiny, data={"path": str(tmp_path / "talks.jsonl")})))
    for turns, num_rows in (("auto", 1), ("each", 2)):  # a second look takes the rows from the cache
        for _ in range(2):
            words = [f"data.turns={turns}", "--output", str(tmp_path / "data.png")]
            assert run(monkeypatch, "data", str(recipe), *words) == 0
            out = capsys.readouterr().out
            assert "ShareGPT" in out and "'mood'" in out and f"data.turns={turns}" in out
            assert f"{num_rows} rows, " in out and f"</s> ({num_rows} rows)" in out
    assert "<s>hello</s><s>[[ant</s>]]" in out and "<s>hello</s><s>ant</s><s>more</s><s>[[bear</s>]]" in out


def pair(response):
    return json.dumps({"prompt": "a", "response": response})


@pytest.mark.parametrize("select", [{}, {"select": "longest", "select_rows": 1}])
def test_rows_that_are_left_out_are_listed_by_line(tiny, tmp_path, capsys, monkeypatch, select):
    rows, empty, long = pair("b"), pair(" "), pair("b" * 999)
    (tmp_path / "a.jsonl").write_text("\n".join([rows, empty, "", rows]))
    (tmp_path / "b.jsonl").write_text("\n".join([long, rows]))
    data = {"path": f"{tmp_path}/[ab].jsonl", "empty_rows": "drop", **select}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(made.recipe_values(tiny, data=data)))
    assert run(monkeypatch, "data", str(recipe), "--left-out") == 0
    places = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    left_out = [where for where, mark, _ in places if mark]
    assert left_out == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1"]


def test_what_the_checks_find_is_found(tiny, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(made.recipe_values(tiny)))
    assert run(monkeypatch, "data", str(recipe), "data.split=test") == 2
    assert "data.split=train" in capsys.readouterr().err
