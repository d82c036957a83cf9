"""Checks of what the mask is made from: calibration rows, a saved mask."""

import pytest

from speft_ds.config.mask_config import NEEDS_DATA, mask_file
from speft_ds.jobs.preflight import check_inputs
from unit.test_preflight.made import problems_of


@pytest.mark.parametrize("salience", sorted(NEEDS_DATA))
def test_a_metric_that_needs_data_with_no_data(ready, salience):
    recipe = ready("data.path=null", f"mask.salience={salience}", "model.dtype=float32")
    shown = problems_of(recipe, needs_training_rows=False)
    assert f"mask.salience={salience} needs calibration data" in shown
    assert f"command line: mask.salience={salience}" in shown
    assert "set data.path or mask.calibration_path" in shown
    assert "a metric without data: magnitude, low_magnitude, synflow, random, lift" in shown


@pytest.mark.parametrize("salience", ["magnitude", "low_magnitude", "synflow", "random", "lift"])
def test_a_data_free_metric_is_scored_without_data(ready, salience):
    for data in ("data.path=null", "data.path=nowhere.jsonl"):
        check_inputs(ready(data, f"mask.salience={salience}"), 1, needs_training_rows=False)


def test_scoring_checks_neither_batch_nor_tasks(ready):
    check_inputs(ready("eval.include_path=nowhere"), 3, needs_training_rows=False)
    shown = problems_of(ready("model.name_or_path=./nowhere", "deepspeed.config=x"), 3, False)
    assert "no model folder ./nowhere" in shown and "no DeepSpeed config x" in shown


def test_scoring_checks_the_rows_that_it_reads(ready, tmp_path):
    shown = problems_of(ready("data.path=nowhere.jsonl"), needs_training_rows=False)
    assert "no data file nowhere.jsonl" in shown and "data.path=/the/right/path" in shown
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe = ready("data.path=nowhere.jsonl", "mask.calibration_path=other.jsonl")
    check_inputs(recipe, 1, needs_training_rows=False)
    check_inputs(ready("data.path=null", "mask.calibration_path=other.jsonl"), 1, needs_training_rows=False)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "c.txt",
            "a",
            ["none of .jsonl, .json, .csv, .parquet", "command line: mask.calibration_path=c.txt"],
        ),
        ("c.jsonl", None, ["no data file c.jsonl", "type mask.calibration_path=/the/right/path"]),
        ("c.jsonl", "", ["c.jsonl has no rows", "type mask.calibration_path=/the/right/path"]),
        ("c.jsonl", "\n{nope}\n", ["not JSON", "c.jsonl:2"]),
        ("c.jsonl", "[1]\n", ["a row is not a JSON object", "c.jsonl:1"]),
        (
            "c.jsonl",
            '{"promt": 1, "response": 2}',
            ["c.jsonl:1", "no column 'prompt'", "rename this file's (promt, response)"],
        ),
    ],
)
def test_bad_calibration_files(ready, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    recipe = ready(f"mask.calibration_path={name}")
    for shown in (problems_of(recipe), problems_of(recipe, needs_training_rows=False)):
        assert "1 problem\n" in shown
        for part in expected:
            assert part in shown
    check_inputs(ready(f"mask.calibration_path={name}", "mask.salience=magnitude"), 1)  # it is not read


def test_columns_of_a_calibration_file_that_stands_alone(ready, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"promt": 1, "response": 2}')
    recipe = ready("data.path=null", "mask.calibration_path=c.jsonl")
    assert "did you mean data.columns.prompt=promt?" in problems_of(recipe, needs_training_rows=False)


@pytest.mark.parametrize("load", ["kept/mask.safetensors", "kept", "kept/"])
def test_a_saved_mask_is_a_file_or_its_folder(ready, tmp_path, load):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mask.safetensors").write_text("")
    check_inputs(ready(f"mask.load={load}"), 1)
    assert str(mask_file(load)) == "kept/mask.safetensors"


@pytest.mark.parametrize(
    ("load", "what"),
    [
        ("nowhere.safetensors", "no mask file nowhere.safetensors"),
        ("nowhere", "no mask file nowhere"),
        ("rows.jsonl", "the mask file rows.jsonl is not a .safetensors file"),
        ("model", "no mask file model/mask.safetensors"),
    ],
)
def test_bad_mask_files(ready, load, what):
    shown = problems_of(ready(f"mask.load={load}"))
    assert what in shown and f"command line: mask.load={load}" in shown and "`speft score RECIPE`" in shown


def test_a_loaded_mask_needs_no_calibration_rows(ready, tmp_path):
    (tmp_path / "m.safetensors").write_text("")
    missing = ["mask.load=m.safetensors", "mask.calibration_path=nowhere.jsonl"]
    check_inputs(ready(*missing), 1)
    shown = problems_of(ready(*missing, "mask.schedule=periodic"))
    assert "no data file nowhere.jsonl" in shown  # rescoring reads it
