"""Metrics through DeepSpeed's real monitor: from rank 0 alone, one event a step, off where not asked for."""

import csv
import importlib.util
import os

import pytest
from unit.written import load

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.training.metrics import PACKAGES, Monitor, monitor_problems, numbers

STEPS = (
    {"step": 1, "loss": 2.5, "grad_norm": None, "lr": 1e-3},
    {"step": 2, "loss": float("nan"), "grad_norm": 1.5, "lr": 9e-4, "scores": {"arc_easy acc": 0.5}},
    {"step": 3, "loss": 1.25, "grad_norm": 1.0, "lr": 8e-4, "validation_loss": 1.75},
)
EVENTS = {
    "train/loss": [(1, 2.5), (3, 1.25)],
    "train/grad_norm": [(2, 1.5), (3, 1.0)],
    "train/lr": [(1, 1e-3), (2, 9e-4), (3, 8e-4)],
    "train/validation_loss": [(3, 1.75)],
    "scores/arc_easy acc": [(2, 0.5)],
}


def log_steps(recipe, folder):
    """Three steps on every rank, started as a run starts it; what this rank is told if it does not start."""
    os.environ["WANDB_MODE"] = "offline"  # without an account
    made = []
    try:
        collectives.run_on_rank0(lambda: made.append(Monitor(recipe, folder)))
    except UserError as error:
        return error.what
    monitor = made[0] if made else Monitor(recipe, folder)
    for values in STEPS:
        monitor.log(values["step"], values)
    monitor.close()
    monitor.close()  # a second time does nothing
    monitor.log(4, {"loss": 0.0})
    return None


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name: load(tmp_path, "", f"train.monitor={name}")


def is_installed(name):
    return importlib.util.find_spec(name) is not None


def needs(name):
    return pytest.mark.skipif(not is_installed(name), reason=f"the package {name} is not installed")


def test_csv_files_have_each_number_once(ranks, tmp_path, recipe):
    ranks(2)(log_steps, recipe=recipe("csv"), folder=tmp_path / "run")
    found = {}
    for path in (tmp_path / "run" / "csv").iterdir():
        header, *rows = csv.reader(path.open())
        assert header[0] == "step"
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    assert found == {tag.replace("/", "_").replace(" ", "_"): values for tag, values in EVENTS.items()}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["csv"]


def test_none_is_the_default_and_does_nothing(ranks, tmp_path, recipe):
    assert load(tmp_path).train.monitor == "none"
    ranks(2)(log_steps, recipe=recipe("none"), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_reads_what_was_written(ranks, tmp_path, recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks(2)(log_steps, recipe=recipe("tensorboard"), folder=tmp_path / "run")
    files = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(files) == 1
    events = EventAccumulator(str(files[0])).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {tag: [(step, pytest.approx(v)) for step, v in values] for tag, values in EVENTS.items()}


@needs("wandb")
def test_wandb_keeps_its_files_in_the_run_folder(ranks, tmp_path, recipe):
    (tmp_path / "run").mkdir()
    ranks(2)(log_steps, recipe=recipe("wandb"), folder=tmp_path / "run")
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_said_before_anything_starts(tmp_path, recipe, name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else find(n))
    (problem,) = monitor_problems(recipe(name))
    assert name in problem.what and f"train.monitor={name}" in problem.what
    assert problem.where == f"command line: train.monitor={name}" and f"pip install {name}" in problem.fix
    assert monitor_problems(recipe("csv")) == monitor_problems(recipe("none")) == []


@pytest.mark.parametrize("name", [name for name in PACKAGES if not is_installed(name)])
def test_every_rank_is_told_of_a_missing_package(ranks, tmp_path, recipe, name):
    told = ranks(2)(log_steps, recipe=recipe(name), folder=tmp_path / "run")
    assert all(name in what for what in told)


def test_only_finite_numbers_are_events():
    others = {"step": 3, "b": None, "c": float("inf"), "d": "text"}
    assert numbers({**others, "a": 1, "scores": {"x acc": 0.5, "y": None}}) == [
        ("train/a", 1),
        ("scores/x acc", 0.5),
    ]
