"""Checks of the training rows before torch is imported."""

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError
from speft_ds.jobs.preflight import check_inputs
from unit.test_preflight.made import problems_of


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.txt", "a", ["none of .jsonl, .json, .csv, .parquet"]),
        ("rows.jsonl", None, ["no data file rows.jsonl", "mine.yaml:4 (data.path)"]),
        ("rows.jsonl", "", ["rows.jsonl has no rows"]),
        ("rows.jsonl", "\n \n", ["rows.jsonl has no rows"]),
        ("rows.json", "[]", ["rows.json has no rows"]),
        ("rows.json", "", ["rows.json has no rows"]),
        ("rows.json", '{"prompt": 1}', ["holds a list of objects"]),
        ("rows.json", '{"prompt": 1}\n{"prompt": 1}', ["not JSON", ".jsonl holds one JSON object a line"]),
        ("rows.jsonl", "\n{nope}\n", ["not JSON", "rows.jsonl:2"]),
        ("rows.jsonl", "[1]\n", ["a row is not a JSON object", "rows.jsonl:1"]),
        ("rows.jsonl", b"\xff\xff", ["cannot read the data file"]),
        (
            "rows.jsonl",
            '{"promt": 1, "output": 2}',
            [
                "did you mean data.columns.prompt=promt?",
                "type data.columns.response=COLUMN, one of: promt, output",
            ],
        ),
    ],
)
def test_bad_data_files(ready, tmp_path, name, content, expected):
    (tmp_path / "rows.jsonl").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = problems_of(ready() if name == "rows.jsonl" else ready(f"data.path={name}"))
    for part in expected:
        assert part in shown


def test_training_rows_are_needed(ready):
    shown = problems_of(ready("data.path=null"))
    assert "1 problem\n" in shown and "data.path is missing" in shown
    assert "command line: data.path=null" in shown and "data.path=/the/right/path" in shown
    shown = problems_of(ready("data.path=null", "mask.salience=random"))
    assert "data.path is missing" in shown


def test_a_folder_of_rows(ready, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "the folder folder has no file of rows" in problems_of(ready("data.path=folder"))
    (tmp_path / "folder" / "train.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "folder" / "test.csv").write_text("question,answer\na,b\n")
    check_inputs(ready("data.path=folder"), 1)
    shown = problems_of(ready("data.path=folder", "data.split=test"))
    assert "test.csv:2" in shown and "data.columns.prompt=COLUMN, one of: question, answer" in shown
    shown = problems_of(ready("data.path=folder", "data.split=tset"))
    assert "has no split 'tset'; it has train, test" in shown and "did you mean test?" in shown
    assert "command line: data.path=folder" in shown


def test_a_subset_of_a_folder_is_what_is_checked(ready, tmp_path):
    for name, header in (("cola", "sentence,label"), ("rte", "prompt,response")):
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "train.csv").write_text(f"{header}\na,b\n")
    check_inputs(ready("data.path=glue", "data.subset=rte"), 1)
    assert "no column 'prompt'" in problems_of(ready("data.path=glue", "data.subset=cola"))
    assert "'nosuch' not found" in problems_of(ready("data.path=glue", "data.subset=nosuch"))


def test_every_source_of_a_mixture_is_checked(ready, tmp_path):
    (tmp_path / "mine2.yaml").write_text(
        "model: {name_or_path: ./model}\n"
        "data:\n  mixture:\n    - path: rows.jsonl\n    - path: nowhere.jsonl\n      weight: 2\n"
        "    - path: rows.jsonl\n      weight: 1\n      format: text\n"
    )
    with pytest.raises(RecipeError, match=r"(?s)a weight to some of its sources only.*mine2.yaml:3"):
        load_recipe("mine2.yaml")
    text = (tmp_path / "mine2.yaml").read_text().replace("- path: rows", "- weight: 3\n      path: rows", 1)
    (tmp_path / "mine2.yaml").write_text(text)
    shown = problems_of(load_recipe("mine2.yaml"))
    assert "no data file nowhere.jsonl\n      where: mine2.yaml:6 (data.mixture[1].path)" in shown
    assert "no column 'text', named by data.columns.text" in shown


def test_only_the_first_rows_are_read(ready, tmp_path):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n' * 5 + "broken")
    check_inputs(ready(), 1)  # the rest is read, and checked, when it is tokenised
