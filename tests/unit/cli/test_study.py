"""`speft study` without ranks: what it refuses before anything runs, SLURM arrays, shares of a machine."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from speft_ds.cli.commands import study as command
from speft_ds.config.load_recipe import ROOT, load_recipe
from speft_ds.errors import UserError
from unit.commands import run
from unit.written import write_inputs

STUDY = {
    "recipe": "./mine.yaml",
    "set": {"eval.validation": "rows.jsonl"},
    "axes": {"mask.layers": [[0, 1], None]},
    "rates": {"start": [1e-3, 1e-2]},
    "seeds": [1, 2],
}


@pytest.fixture
def study(own_folder, tmp_path, monkeypatch, capsys):
    """study(words, code): what the command says, in a folder with a study, its recipe and its files."""
    write_inputs(tmp_path)
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(STUDY))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def typed(*words, code=0):
        assert run(monkeypatch, "study", "rates.yaml", *words) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return typed


def test_an_invalid_run_is_reported_before_anything_runs(study, tmp_path):
    """By a command that does not import torch."""
    study("mask.density=2", code=2)
    assert "rows.txt" in study("data.path=rows.txt", code=2)
    assert not (tmp_path / "runs").exists()
    words = ["study", "rates.yaml", "mask.density=2"]
    (tmp_path / "check.py").write_text(
        "import sys\nfrom speft_ds.cli.main import app\nfrom speft_ds.errors import RecipeError\n"
        f"try:\n    app({words}, standalone_mode=False)\n"
        "except RecipeError:\n    print('torch' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "check.py"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_folder_with_something_else_is_refused(study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "--output" in study("--output", "out", code=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_as_a_slurm_array(study, tmp_path):
    """A line for each run that is needed now, which loads as a recipe; there are no other rates yet."""
    (tmp_path / "bin").mkdir()
    tool, log = tmp_path / "bin" / "sbatch", tmp_path / "call.json"
    tool.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['SPEFT_ROOT']], open({str(log)!r}, 'w'))\nprint('7;cluster')\n"
    )
    tool.chmod(0o755)
    study("--slurm", "--sbatch=--gpus-per-node=1", "train.steps=9")
    file = tmp_path / "runs" / "rates" / "array-1.txt"
    script, own = str(ROOT / "launch" / "slurm" / "array.sbatch"), str(file.relative_to(tmp_path))
    assert json.loads(log.read_text()) == [
        ["--parsable", "--array=1-4", "--gpus-per-node=1", script, own],
        str(ROOT),
    ]
    recipes = [load_recipe(words[0], words[1:]) for words in map(shlex.split, file.read_text().splitlines())]
    found = [(recipe.mask.layers, recipe.optimizer.lr, recipe.seed, recipe.train.steps) for recipe in recipes]
    assert found == [(layers, rate, 1, 9) for layers in ([0, 1], None) for rate in (1e-3, 1e-2)]
    assert len({recipe.output_dir for recipe in recipes}) == 4
    study("--slurm", "train.steps=9")
    assert file.with_name("array-2.txt").read_text() == file.read_text()  # queued jobs read the first one


def test_without_sbatch(study):
    for _ in range(2):  # the first leaves a folder that is a study's
        assert "PATH" in study("--slurm", code=2)
    assert "--slurm" in study("--sbatch=--gpus-per-node=1", code=2)
    assert "gpus-per-node" in study("--slurm", "--sbatch", "gpus-per-node=1", code=2)


def test_the_table_of_nothing(study, tmp_path):
    study("--table-only", "--output", "out")
    assert (tmp_path / "out" / "report.html").is_file() and not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("jobs", "ranks", "gpus", "expected"),
    [
        (1, None, 4, ["0,1,2,3"]),
        (2, None, 4, ["0,1", "2,3"]),
        (2, 1, 4, ["0", "1"]),
        (3, None, 4, ["0", "1", "2"]),
        (3, 2, 4, None),
        (2, None, 1, None),
    ],
)
def test_runs_at_a_time_share_the_gpus(monkeypatch, jobs, ranks, gpus, expected):
    monkeypatch.setattr(command, "visible_gpus", lambda: list(range(gpus)))
    if expected is None:
        with pytest.raises(UserError) as caught:
            command._slots(jobs, ranks)
        assert "--jobs" in caught.value.fix
        return
    slots, count = command._slots(jobs, ranks)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected
    assert count == len(expected[0].split(","))


def test_runs_at_a_time_share_the_cores(monkeypatch):
    monkeypatch.setattr(command, "visible_gpus", list)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert command._slots(2, 2) == ([{"OMP_NUM_THREADS": "2"}] * 2, 2)
