"""`speft validate`: what is found, what is said of it, and the exit code."""

import json
import re
from functools import partial

import pytest
import tiny

from speft_ds.cli.commands import validate as checks
from unit.commands import run, speft
from unit.written import load

ROW = '{"prompt": "say a", "response": "b"}\n'


@pytest.fixture
def checked(tmp_path, own_folder, capsys, monkeypatch):
    """`checked(*overrides, code=0)`: what is said of a recipe whose model and rows are there."""
    tiny.make_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(ROW * 4)
    load(tmp_path)

    def check(*overrides, code=0):
        words = ["model.name_or_path=./model", "data.max_length=64", *overrides]
        assert run(monkeypatch, "validate", "mine.yaml", *words, "--ranks", "2") == code
        return capsys.readouterr().out

    return check


def test_a_recipe_that_is_ready(checked):
    shown = checked("mask.targets=[q_proj]")
    assert "<s>say a</s><s>[[b</s>]]" in shown
    assert "targets: 2 of" in shown and "14 of their 2,800 elements" in shown
    assert "16 = 4 x 2 ranks x 2 accumulated" in shown
    # What to type next can be pasted: brackets are no markup, and the shell's signs are quoted.
    assert "speft train mine.yaml model.name_or_path=./model" in shown
    assert "'mask.targets=[q_proj]'" in shown
    numbers = re.findall(r"^(?:ok|note) +(\d+)\. ", shown, re.M)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and len(numbers) >= 9


def test_everything_that_is_missing_is_said_at_once(checked):
    words = ["data.path=none.jsonl", "deepspeed.config=zero3_cup", "mask.load=none", "train.micro_batch=16"]
    shown = checked(*words, code=2)
    assert all(f"command line: {word}" in shown for word in words[:3]) and "(train.global_batch)" not in shown
    assert shown.count("fix: ") == 4 and shown.count("\nskipped ") == 2  # rows, targets


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=fast", "train.stps=1"], "train.steps"),  # does not load
        (["mask.layer_gate=sampled", "mask.gate_layers=9"], "mask.gate_layers"),
        (["output_dir=model"], "output_dir=model-2"),
    ],
)
def test_a_recipe_that_is_not_ready(checked, words, said):
    assert said in checked(*words, code=2)


def test_first_rows_that_are_all_left_out(checked, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW.replace('"b"', '""'))
    assert "rows.jsonl:1: " in checked("data.empty_rows=drop")
    assert "rows.jsonl:1" in checked(code=2)


def test_how_many_rows_are_read_and_which_are_left_out(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CHECKED", {checks.ROWS: partial(checks.rows_found, most=6)})
    monkeypatch.setattr(checks, "NEEDED", {})
    long, empty, broken = ROW.replace("b", "b" * 99), ROW.replace('"b"', '""'), "{"
    (tmp_path / "rows.jsonl").write_text(ROW + long + ROW + "\n" + empty + ROW * 2 + long + ROW)
    words = ["data.empty_rows=drop", "mask.salience=magnitude"]
    shown = checked(*words)
    assert "6 rows read" in shown and "--all" in shown and "2 left out" in shown
    assert re.findall(r"rows\.jsonl:\d+", shown) == ["rows.jsonl:2", "rows.jsonl:5"]
    shown = checked(*words, "--all")
    assert "8 rows read" in shown and "--all" not in shown and "rows.jsonl:8" in shown
    # What only --all can find; rows to validate on are read, too.
    (tmp_path / "validation.jsonl").write_text(ROW * 7 + broken)
    checked(*words, "eval.validation=validation.jsonl")
    assert "validation.jsonl:8" in checked(*words, "eval.validation=validation.jsonl", "--all", code=2)


def test_a_log_holds_no_signs_and_any_row(checked, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW.replace("say a", "\u4e16\u754c") * 4, encoding="utf-8")
    words = ["validate", "mine.yaml", "model.name_or_path=./model", "data.max_length=64"]
    done = speft(*words, "deepspeed.config=nowhere", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout.isascii()
    assert re.findall(r"^(\w+) +(?:2|7)\. ", done.stdout, re.M) == ["ok", "problem"]


def test_a_damaged_tokenizer(checked, tmp_path):
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    assert "tokenizer" in checked(code=2)


def test_a_conversation_that_could_not_have_been_held(checked, tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    rows = [json.dumps({"messages": talk}) for talk in (turns, [turns[0], *turns])]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:1]))
    assert "<s>a</s><s>[[a</s>]]" in checked("data.format=messages")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(["{}", *rows, "{", rows[1]] + [rows[0]] * 30 + ["[]"] * 30)
    )
    shown = checked("data.format=messages", code=2)  # of each reason some, with what the first rows lack
    assert re.findall(r"rows\.jsonl:(\d+)", shown)[:7] == [*map(str, (1, 3, 5, 4, 36, 37, 38))]
    assert "34 rows" in shown and "1 problem " in shown and "27 more" in shown
    shown = checked("data.format=messages", "--all", code=2)
    assert {*re.findall(r"rows\.jsonl:(\d+)", shown)} == {*map(str, (1, 3, 4, 5, *range(36, 66)))}
