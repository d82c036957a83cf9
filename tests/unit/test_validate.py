"""`speft validate`: what is found, what is said of it, and the exit code."""

import tiny

from speft_ds.cli.commands.validate import validate
from unit.written import load


def ready(tmp_path, monkeypatch, rows='{"prompt": "say a", "response": "b"}\n'):
    monkeypatch.chdir(tmp_path)
    tiny.make_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(rows * 4)
    load(tmp_path)
    return ["model.name_or_path=./model", "data.max_length=64"]


def test_a_recipe_that_is_ready(tmp_path, monkeypatch, capsys):
    overrides = [*ready(tmp_path, monkeypatch), "mask.targets=[q_proj]"]
    assert validate("mine.yaml", overrides) == 0
    shown = capsys.readouterr().out
    assert "<s>say a</s><s>[[b</s>]]" in shown
    assert "2 linears, 2,800 weights" in shown and "14 of them trained" in shown
    # What to type next can be pasted: brackets are no markup, and the shell's signs are quoted.
    assert "launch/train.py --recipe mine.yaml model.name_or_path=./model" in shown
    assert "'mask.targets=[q_proj]'" in shown
    assert [line[2:4] for line in shown.splitlines() if line[3:5] == ". "] == [f"{n}." for n in range(1, 10)]


def test_everything_that_is_missing_is_said_at_once(tmp_path, monkeypatch, capsys):
    overrides = ready(tmp_path, monkeypatch)
    more = ["data.path=none.jsonl", "deepspeed.config=zero3_cup", "mask.load=none", "train.micro_batch=16"]
    assert validate("mine.yaml", [*overrides, *more], num_ranks=2) == 2
    shown = capsys.readouterr().out
    for part in ("no data file none.jsonl", "zero3_cpu", "no mask file none", "16 x 2 ranks"):
        assert part in shown
    assert " problems to mend" in shown and "7. rows as the model sees them: needs the model and" in shown


def test_a_recipe_that_does_not_load(tmp_path, monkeypatch, capsys):
    overrides = ready(tmp_path, monkeypatch)
    assert validate("mine.yaml", [*overrides, "optimizer.lr=fast", "train.stps=1"]) == 2
    shown = capsys.readouterr().out
    assert "optimizer.lr is 'fast'" in shown and "did you mean train.steps?" in shown


def test_first_rows_that_are_all_left_out(tmp_path, monkeypatch, capsys):
    overrides = ready(tmp_path, monkeypatch, rows='{"prompt": "a", "response": ""}\n')
    assert validate("mine.yaml", [*overrides, "data.empty_rows=drop"]) == 0
    assert "the first rows are all left out" in capsys.readouterr().out
    assert validate("mine.yaml", overrides) == 2
    assert "rows.jsonl:1" in capsys.readouterr().out


def test_a_damaged_tokenizer(tmp_path, monkeypatch, capsys):
    overrides = ready(tmp_path, monkeypatch)
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    assert validate("mine.yaml", overrides) == 2
    assert "cannot load the tokenizer" in capsys.readouterr().out


def test_more_gate_layers_than_there_are(tmp_path, monkeypatch, capsys):
    overrides = ready(tmp_path, monkeypatch)
    assert validate("mine.yaml", [*overrides, "mask.layer_gate=sampled", "mask.gate_layers=9"]) == 2
    assert "a gate that opens 9 of 2 layers shuts nothing" in capsys.readouterr().out
