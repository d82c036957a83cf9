"""benchmarks/quality*.py: their recipes, what is started again, statistics and table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality
import quality_columns
import quality_formats
from quality import ACCURACY, LOSS, Run
from quality_columns import FREE

from speft_ds.config.load_recipe import load_recipe

COLUMNS, FORMATS = quality_columns.COMPARISON, quality_formats.COMPARISON


@pytest.fixture
def arguments(tmp_path):
    for name in COLUMNS.files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("{}\n")
    words = ["--data", str(tmp_path / "data"), "--model", "model", "--output", str(tmp_path / "runs")]
    return quality.parse_arguments(COLUMNS, "", words)


def finish(run: Run, output: Path, loss: float, accuracy: float | None, compute: float = 0.25) -> None:
    """A finished run's folder, as far as it is read."""
    folder = output / run.name
    (folder / "eval").mkdir(parents=True)
    mask = {"num_trainable": 100, "compute": compute, "sha256": "0"}
    (folder / "run.json").write_text(
        json.dumps({"finished": True, "mask": mask, "num_steps": 2, "machine": {}})
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"dtype": "bfloat16"}}))
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0, "validation_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is not None:
        scores = [
            {"metric": "acc_norm", "value": -1.0, "is_main": False, "num_documents": 9},
            {"metric": "acc", "value": accuracy, "is_main": True, "num_documents": 9},
        ]
        (folder / "eval" / "after.json").write_text(json.dumps({"scores": scores}))


@pytest.mark.parametrize("comparison", [COLUMNS, FORMATS], ids=lambda one: one.name)
def test_recipes_of_a_seed_differ_in_the_variant_alone(arguments, comparison):
    runs = comparison.runs(arguments.seeds)
    num_each = len(comparison.data_sets)
    num_trained = 3 * len(comparison.variants) * num_each
    assert len({run.name for run in runs}) == len(runs) == num_trained + len(comparison.untouched) * num_each
    assert {run.seed for run in runs[: num_trained // 3]} == {1}  # a part of the runs is a comparison
    sections = ("model", "data", "mask", "optimizer", "train", "eval", "seed")
    for data_set in comparison.data_sets:
        recipes = {}
        for run in runs:
            if run.data_set == data_set and run.seed == 1:
                recipe = load_recipe(str(quality.write_recipe(run, comparison, arguments)))
                recipes[run.variant] = recipe.model_dump(include=set(sections))
        reference = recipes[comparison.reference]
        for name, changes in comparison.variants.items():
            expected = {key: reference[key] | changes.get(key, {}) for key in sections if key != "seed"}
            assert recipes[name] == expected | {"seed": 1}
        for name in comparison.untouched:
            assert recipes[name]["train"]["steps"] == 1
            assert recipes[name]["eval"] == reference["eval"]


def test_only_what_is_not_finished_is_started(arguments, monkeypatch):
    done, broken = Run("sst2", "0.1", 1), Run("sst2", "0.1", 2)
    finish(done, arguments.output, 1.0, 0.5)
    started = []

    def start(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(quality.subprocess, "run", start)
    assert quality.train(done, arguments.output) == 0
    assert quality.train(broken, arguments.output) == 3
    (command,) = started
    assert str(arguments.output / "recipes" / f"{broken.name}.yaml") in command
    assert command[-2:] == ["--resume", "auto"]


def test_runs_of_other_settings_are_not_taken_for_these(arguments):
    run = Run("alpaca", "0.05", 1)
    path = quality.write_recipe(run, COLUMNS, arguments)
    assert quality.write_recipe(run, COLUMNS, arguments) == path
    path.write_text(path.read_text().replace("density: 0.005", "density: 0.01"))
    with pytest.raises(SystemExit) as error:
        quality.write_recipe(run, COLUMNS, arguments)
    assert str(path) in str(error.value)


def test_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.parse_arguments(COLUMNS, "", ["--data", str(tmp_path)])
    said = capsys.readouterr().err
    assert all(name in said for name in COLUMNS.files)


def test_variants_are_compared_seed_by_seed(arguments):
    arguments.seeds, output = [1, 2, 3, 4], arguments.output
    free = {1: (0.40, 0.80), 2: (0.30, 0.90), 3: (0.50, 0.82)}
    confined = {1: (0.42, 0.79), 3: (0.53, 0.80), 4: (9.0, 0.1)}  # 4 has no partner
    for variant, by_seed in ((FREE, free), ("0.05", confined)):
        for seed, (loss, accuracy) in by_seed.items():
            finish(Run("sst2", variant, seed), output, loss, accuracy)
    finish(Run("sst2", "untouched", 1), output, 7.0, 0.5)
    finish(Run("alpaca", FREE, 1), output, 1.7, None)
    results = quality.results_of(COLUMNS, arguments)
    assert len(results) == 8
    summary = quality.summary(COLUMNS, results)
    rows = {(row["data_set"], row["measure"], row["variant"]): row for row in summary}
    assert len(rows) == 2 * 3 + 1

    row = rows["sst2", LOSS, "0.05"]
    assert row["seeds"] == [1, 3, 4] and row["mean"] == pytest.approx(numpy.mean([0.42, 0.53, 9.0]))
    assert row["stderr"] == pytest.approx(numpy.std([0.42, 0.53, 9.0], ddof=1) / math.sqrt(3))
    assert row["differences"] == pytest.approx([0.02, 0.03])
    assert row["difference"] == pytest.approx(0.025)
    assert row["difference_stderr"] == pytest.approx(numpy.std([0.02, 0.03], ddof=1) / math.sqrt(2))
    assert rows["sst2", ACCURACY, "0.05"]["differences"] == pytest.approx([-0.01, -0.02])
    for variant in (FREE, "untouched"):
        assert rows["sst2", LOSS, variant]["difference"] is None
    alone = rows["alpaca", LOSS, FREE]
    assert (alone["mean"], alone["stderr"]) == (1.7, None)


def test_shared_entries_are_those_of_the_same_weight(arguments, monkeypatch):
    entries = {
        FREE: {"a": torch.tensor([1, 5]), "b": torch.tensor([2, 3])},
        "0.1": {"a": torch.tensor([1, 2, 7]), "c": torch.tensor([3])},
    }
    for variant in entries:
        finish(Run("alpaca", variant, 2), arguments.output, 1.0, None)
    monkeypatch.setattr(quality_columns, "entries_of", lambda folder: entries[folder.name.split("-")[1]])
    results = quality.results_of(COLUMNS, arguments)
    quality_columns.add_shared(results, arguments.output)
    assert {result["variant"]: result.get("shared") for result in results} == {FREE: None, "0.1": 1 / 4}


def test_accuracies_are_percentages_and_losses_are_not(arguments):
    for seed, gain in ((1, 0.01), (2, 0.03)):
        finish(Run("sst2", FREE, seed), arguments.output, 0.5, 0.8)
        finish(Run("sst2", "0.1", seed), arguments.output, 0.5 + gain, 0.8 + gain, compute=0.09)
    rows = quality.summary(COLUMNS, quality.results_of(COLUMNS, arguments))
    shown = {(row["measure"], row["variant"]): quality.table_row(COLUMNS, row) for row in rows}
    accuracy, loss = shown[ACCURACY, "0.1"], shown[LOSS, "0.1"]
    assert "82.00 ± 1.00" in accuracy and "+2.00 ± 1.00" in accuracy and "9.0%" in accuracy
    assert "0.5200 ± 0.0100" in loss and "+0.0200 ± 0.0100" in loss
    assert shown[LOSS, FREE][5:7] == ["", ""]
