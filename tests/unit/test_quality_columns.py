"""benchmarks/quality_columns.py: its recipes, what it starts again, its statistics and its table."""

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

import quality_columns as quality

from speft_ds.config.load_recipe import load_recipe


@pytest.fixture
def arguments(tmp_path):
    for name in quality.FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("{}\n")
    words = ["--data", str(tmp_path / "data"), "--model", "model", "--output", str(tmp_path / "runs")]
    return quality.parse_arguments(words)


def finish(
    run: quality.Run, output: Path, loss: float, accuracy: float | None, compute: float = 0.25
) -> None:
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


def test_recipes_of_a_seed_differ_in_the_columns_alone(arguments):
    runs = quality.runs_of(arguments.seeds)
    assert len(runs) == len(set(runs)) == 3 * 2 * 3 + 2
    assert {run.seed for run in runs[:6]} == {1}  # a part of the runs is a comparison
    for data_set in quality.DATA_SETS:
        recipes = {}
        for run in runs:
            if run.data_set == data_set and run.seed == 1:
                recipe = load_recipe(str(quality.write_recipe(run, arguments)))
                values = recipe.model_dump(
                    include={"model", "data", "mask", "optimizer", "train", "eval", "seed"}
                )
                recipes[run.mask] = values, values["mask"].pop("compute")
        free, nothing = recipes[quality.FREE]
        assert nothing is None
        assert recipes["0.1"] == (free, 0.1) and recipes["0.05"] == (free, 0.05)
        untouched, _ = recipes[quality.UNTOUCHED]
        assert untouched["train"]["steps"] == 1 and untouched["eval"] == free["eval"]


def test_only_what_is_not_finished_is_started(arguments, monkeypatch):
    done, broken = quality.Run("sst2", "0.1", 1), quality.Run("sst2", "0.1", 2)
    for run in (done, broken):
        quality.write_recipe(run, arguments)
    finish(done, arguments.output, 1.0, 0.5)
    started = []

    def start(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(quality.subprocess, "run", start)
    assert quality.train(done, arguments) == 0
    assert quality.train(broken, arguments) == 3
    (command,) = started
    assert str(arguments.output / "recipes" / f"{broken.name}.yaml") in command
    assert command[-2:] == ["--resume", "auto"]


def test_runs_of_other_settings_are_not_taken_for_these(arguments):
    run = quality.Run("alpaca", "0.05", 1)
    path = quality.write_recipe(run, arguments)
    assert quality.write_recipe(run, arguments) == path
    path.write_text(path.read_text().replace("density: 0.005", "density: 0.01"))
    with pytest.raises(SystemExit) as error:
        quality.write_recipe(run, arguments)
    assert str(path) in str(error.value)


def test_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.parse_arguments(["--data", str(tmp_path)])
    said = capsys.readouterr().err
    assert all(name in said for name in quality.FILES)


def test_masks_are_compared_seed_by_seed(tmp_path):
    free = {1: (0.40, 0.80), 2: (0.30, 0.90), 3: (0.50, 0.82)}
    confined = {1: (0.42, 0.79), 3: (0.53, 0.80), 4: (9.0, 0.1)}  # 4 has no partner
    for mask, by_seed in ((quality.FREE, free), ("0.05", confined)):
        for seed, (loss, accuracy) in by_seed.items():
            finish(quality.Run("sst2", mask, seed), tmp_path, loss, accuracy)
    finish(quality.Run("sst2", quality.UNTOUCHED, 1), tmp_path, 7.0, 0.5)
    finish(quality.Run("alpaca", quality.FREE, 1), tmp_path, 1.7, None)
    runs = [
        quality.Run(data_set, mask, seed)
        for data_set in quality.DATA_SETS
        for mask in (quality.UNTOUCHED, *quality.MASKS)
        for seed in (1, 2, 3, 4)
    ]
    results = [result for run in runs if (result := quality.result_of(run, tmp_path))]
    assert len(results) == 8
    rows = {(row["data_set"], row["measure"], row["mask"]): row for row in quality.summary(results)}
    assert len(rows) == 2 * 3 + 1

    row = rows["sst2", quality.LOSS, "0.05"]
    assert row["seeds"] == [1, 3, 4] and row["mean"] == pytest.approx(numpy.mean([0.42, 0.53, 9.0]))
    assert row["stderr"] == pytest.approx(numpy.std([0.42, 0.53, 9.0], ddof=1) / math.sqrt(3))
    assert row["differences"] == pytest.approx([0.02, 0.03])
    assert row["difference"] == pytest.approx(0.025)
    assert row["difference_stderr"] == pytest.approx(numpy.std([0.02, 0.03], ddof=1) / math.sqrt(2))
    assert rows["sst2", quality.ACCURACY, "0.05"]["differences"] == pytest.approx([-0.01, -0.02])
    for mask in (quality.FREE, quality.UNTOUCHED):
        assert rows["sst2", quality.LOSS, mask]["difference"] is None
    alone = rows["alpaca", quality.LOSS, quality.FREE]
    assert (alone["mean"], alone["stderr"]) == (1.7, None)


def test_shared_entries_are_those_of_the_same_weight(tmp_path, monkeypatch):
    entries = {
        quality.FREE: {"a": torch.tensor([1, 5]), "b": torch.tensor([2, 3])},
        "0.1": {"a": torch.tensor([1, 2, 7]), "c": torch.tensor([3])},
    }
    for mask in entries:
        finish(quality.Run("alpaca", mask, 2), tmp_path, 1.0, None)
    monkeypatch.setattr(quality, "entries_of", lambda folder: entries[folder.name.split("-")[1]])
    results = [quality.result_of(quality.Run("alpaca", mask, 2), tmp_path) for mask in entries]
    quality.add_shared(results, tmp_path)
    assert [row["shared"] for row in quality.summary(results)] == [None, 1 / 4]


def test_accuracies_are_percentages_and_losses_are_not(tmp_path):
    for seed, gain in ((1, 0.01), (2, 0.03)):
        finish(quality.Run("sst2", quality.FREE, seed), tmp_path, 0.5, 0.8)
        finish(quality.Run("sst2", "0.1", seed), tmp_path, 0.5 + gain, 0.8 + gain, compute=0.09)
    runs = quality.runs_of([1, 2])
    rows = quality.summary([result for run in runs if (result := quality.result_of(run, tmp_path))])
    shown = {(row["measure"], row["mask"]): quality.table_row(row) for row in rows}
    accuracy, loss = shown[quality.ACCURACY, "0.1"], shown[quality.LOSS, "0.1"]
    assert len(accuracy) == len(quality.HEADER)
    assert "82.00 ± 1.00" in accuracy and "+2.00 ± 1.00" in accuracy and "9.0%" in accuracy
    assert "0.5200 ± 0.0100" in loss and "+0.0200 ± 0.0100" in loss
    assert shown[quality.LOSS, quality.FREE][5:7] == ["", ""]
