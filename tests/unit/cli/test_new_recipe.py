"""`speft new`: what is proposed for rows of many kinds, and that it can be used as it is."""

import csv
import json
import re

import pytest
import tiny

from speft_ds.config.load_recipe import load_recipe
from speft_ds.jobs.preflight import check_inputs
from unit.commands import run

QUESTIONS = [
    {"ID": n, "Customer question": f"where is {n}?", "Agent answer": "there " * 3} for n in range(40)
]


@pytest.fixture
def write_new(tmp_path, own_folder, monkeypatch, capsys):
    """`write_new(rows, *options, code=0)`: (recipe mine.yaml or None, what is printed)."""
    tiny.make_model(tmp_path / "model")
    monkeypatch.setattr("speft_ds.cli.commands.new_recipe.count_gpus", lambda: 0)

    def write(rows, *options, code=0, file="rows.jsonl"):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["new", "mine.yaml", "--data", file, "--model", "./model", *options]
        assert run(monkeypatch, *words) == code
        said = capsys.readouterr()
        return (load_recipe("mine.yaml") if code == 0 else None), said.out + said.err

    return write


def test_a_table_as_people_have_it(write_new, tmp_path, monkeypatch, capsys):
    rows = [{**row} for row in QUESTIONS]
    rows[3]["Agent answer"], rows[5]["Customer question"], rows[7]["Agent answer"] = "", "a,\nb", "x" * 400
    with (tmp_path / "faq.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    recipe, said = write_new([], file="faq.csv")
    assert (recipe.data.columns.prompt, recipe.data.columns.response) == ("Customer question", "Agent answer")
    assert recipe.data.empty_rows == "drop" and recipe.deepspeed.config == "zero3_cpu"
    # A multi-line field moves the lines below it.
    assert re.findall(r"^  faq\.csv:(\d+): ", said, re.M) == ["5", "10"]
    assert "40 rows read, 2 left out" in said
    # Every value has its reason, and what is printed next can be typed.
    lines = (tmp_path / "mine.yaml").read_text().splitlines()[1:]
    assert all(re.search(r": .*  # \S|^ *\w+:$", line) for line in lines)
    check_inputs(recipe, "train", 2)
    assert run(monkeypatch, "validate", "mine.yaml") == 0
    assert "40 rows read" in capsys.readouterr().out


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"prompt": "a", "response": "b"}, [], {"format": "prompt_completion"}),
        (
            {"answer_id": "1", "answer": "b", "question": "a"},
            [],
            {"prompt": "question", "response": "answer"},
        ),
        ({"Q": "a", "A": "b"}, ["--prompt", "Q", "--response", "A"], {"prompt": "Q", "response": "A"}),
        ({"answer": "a", "title": "b"}, ["--prompt", "title"], {"prompt": "title", "response": "answer"}),
        ({"instruction": "a", "output": "b"}, [], {"format": "alpaca", "input": None}),
        ({"instruction": "a", "input": "c", "output": "b"}, [], {"format": "alpaca", "input": "input"}),
        ({"messages": CHAT}, [], {"format": "messages"}),
        ({"messages": json.dumps(CHAT), "id": "1"}, [], {"format": "messages"}),
        ({"conversation": CHAT}, [], {"format": "messages", "messages": "conversation"}),
        ({"conversations": SHAREGPT}, [], {"format": "messages", "messages": "conversations"}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [], {"format": "messages"}),
        ({"prompt": CHAT[:1], "response": "b"}, [], {"format": "messages"}),
        ({"prompt": "a", "completion": "b"}, [], {"prompt": "prompt", "response": "completion"}),
        ({"ask": CHAT[:1], "say": CHAT[1:]}, ["--prompt", "ask", "--response", "say"], {"prompt": "ask"}),
        ({"text": "a"}, [], {"format": "text"}),
        ({"a: b # c": "a", "answer": "b"}, ["--prompt", "a: b # c"], {"prompt": "a: b # c"}),
    ],
)
def test_the_format_is_told_by_the_columns(write_new, row, options, expected):
    recipe, _ = write_new([row] * 8, *options)
    found = {**recipe.data.columns.model_dump(), "format": recipe.data.format}
    assert expected.items() <= found.items()
    check_inputs(recipe, "train", 2)


@pytest.mark.parametrize(("text", "label"), [("text", "label"), ("sentence", "class")])
def test_labels_are_told_by_their_column(write_new, text, label):
    recipe, _ = write_new([{text: "a", label: n % 2} for n in range(8)])
    assert recipe.data.format == "classification"
    assert (recipe.data.columns.text, recipe.data.columns.label) == (text, label)


def test_what_files_say_is_text_in_the_recipe_and_on_the_terminal(write_new, tmp_path):
    names = ["ask\x1b[2J", "say\u202e\x85 # b:\u2028"]
    row = {names[0]: "a", names[1]: "b"}
    rows = [*[row] * 7, {**row, names[1]: ""}]
    recipe, said = write_new(rows, "--prompt", names[0], "--response", names[1])
    assert [recipe.data.columns.prompt, recipe.data.columns.response] == names
    text = (tmp_path / "mine.yaml").read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert not {"\x1b", "\u202e", "\x85", "\u2028"} & set(said)


def test_rows_behind_those_that_are_looked_at_are_counted(write_new, monkeypatch):
    monkeypatch.setattr("speft_ds.cli.commands.new_recipe.MOST_ROWS", 50)
    recipe, said = write_new([{"prompt": "a", "response": "b"}] * 400)
    assert recipe.train.steps == 3 * 400 // 16 and "the first 50 of 400 rows" in said


def test_lengths_batches_and_steps_follow_the_rows(write_new):
    long = [{"prompt": "a", "response": "b" * 200}]
    recipe, said = write_new([{"prompt": "a", "response": "b" * n} for n in range(1, 60)] + long)
    assert recipe.data.max_length >= 60 and recipe.data.max_length % 32 == 0
    assert (recipe.train.global_batch, recipe.train.micro_batch) == (8, 4)
    assert recipe.train.steps == 23  # 3 epochs of 60 rows
    recipe, _ = write_new([{"prompt": "a", "response": "b"}] * 400, "--force")
    assert recipe.train.global_batch == 16 and recipe.train.steps == 3 * 400 // 16
    assert recipe.mask.calibration_samples == 64
    # A row that is far longer than all others would make every batch wide: it is left out, and named.
    recipe, said = write_new([{"prompt": "a", "response": "b"}] * 99 + long, "--force")
    assert recipe.data.max_length < 200 and "rows.jsonl:100: " in said and "1 left out" in said


def test_a_model_without_a_chat_template(write_new, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    recipe, _ = write_new([{"prompt": "a", "response": "b"}] * 8)
    assert recipe.data.chat_template is False and recipe.data.template == "{prompt}\n\n"


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"a": "1", "b": "2"}], [], "--prompt COLUMN"),
        ([{"a": "1", "b": "2"}], ["--prompt", "c"], "a, b"),
        ([{"prompt": "", "response": ""}], [], "rows.jsonl:1"),
        ([{"prompt": "a", "response": "b"}] * 3 + [{}, {}], [], "rows.jsonl:5"),
        ([{}, {"prompt": "a", "response": "b"}], [], "rows.jsonl:1"),
        ([], [], "rows.jsonl"),
        ([[1]], [], "rows.jsonl"),
        ([{"prompt": "a", "response": "b"}], ["--model", "./none"], "./none"),
        ([{"prompt": "a", "response": "b"}], ["--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_what_nothing_can_be_proposed_for(write_new, tmp_path, rows, options, said):
    assert said in write_new(rows, *options, code=2)[1]
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_that_is_there_stays(write_new, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    assert "--force" in write_new(QUESTIONS, code=2)[1]
    assert (tmp_path / "mine.yaml").read_text() == "mine"
