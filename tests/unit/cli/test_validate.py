"""`speft validate`: what is found, what is said of it, and the exit code."""

import json

import pytest
import tiny

from unit.commands import run
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
    assert "2 linears, 2,800 weights; 14 of them trained" in shown
    assert "16 = 4 x 2 ranks x 2 accumulated" in shown
    # What to type next can be pasted: brackets are no markup, and the shell's signs are quoted.
    assert "launch/train.py --recipe mine.yaml model.name_or_path=./model" in shown
    assert "'mask.targets=[q_proj]'" in shown
    numbers = [line[2:].partition(".")[0] for line in shown.splitlines() if line[0] in "✓!"]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and len(numbers) >= 9


def test_everything_that_is_missing_is_said_at_once(checked):
    words = ["data.path=none.jsonl", "deepspeed.config=zero3_cup", "mask.load=none", "train.micro_batch=16"]
    shown = checked(*words, code=2)
    assert all(f"command line: {word}" in shown for word in words[:3]) and "(train.global_batch)" not in shown
    assert shown.count("fix: ") == 4 and shown.count("\n- ") == 2  # rows, targets


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
    assert "speft data" in checked("data.empty_rows=drop")
    assert "rows.jsonl:1" in checked(code=2)


def test_a_damaged_tokenizer(checked, tmp_path):
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    assert "tokenizer" in checked(code=2)


def test_a_conversation_that_could_not_have_been_held(checked, tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    rows = [json.dumps({"messages": talk}) for talk in (turns, [turns[0], *turns])]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:1]))
    assert "<s>a</s><s>[[a</s>]]" in checked("data.format=messages")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert "rows.jsonl:2" in checked("data.format=messages", code=2)
