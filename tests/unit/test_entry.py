"""What the launched scripts do before the run: arguments, help, checks; and how they end."""

import os
import subprocess
import sys
import types
from unittest import mock

import pytest

from speft_ds.cli import launch
from speft_ds.cli.arguments import parse_arguments
from speft_ds.cli.start_ranks import find_deepspeed
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from unit.written import write_inputs


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A folder with mine.yaml and what it names, and a run folder that is used."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "run.json").write_text("{}")


@pytest.fixture
def stub(tmp_path):
    """A folder of modules in which importing torch fails."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    return tmp_path / "stub"


def started(job, stub, *arguments, **environment):
    """A script, started as the launcher does."""
    command = [sys.executable, str(ROOT / "launch" / f"{job}.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(stub)} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("job", ["train", "score"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--recipe", "mine.yaml", "mask.desnity=1"], 2, "did you mean mask.density?"),
        (["--local_rank=0", "--recipe", "mine.yaml", "model.name_or_path=./nowhere"], 2, "no model folder"),
        (["--recipe", "mine.yaml", "data.path=null"], 2, "data"),
        (["--recipe", "mine.yaml", "output_dir=used"], 2, "used is not empty"),
        (["--recipe", "mine.yaml"], 1, "RuntimeError: torch was imported"),  # all checks passed
        ([], 2, "--recipe"),
    ],
)
def test_a_launched_script_checks_before_it_imports_torch(ready, stub, job, arguments, code, said):
    done = started(job, stub, *arguments)
    assert (done.returncode, done.stdout) == (code, "") and said in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.fixture
def own_environment(monkeypatch):
    """A run sets variables for the libraries, and signal handlers; other tests should not see them."""
    monkeypatch.setattr("speft_ds.comm.signals.watch_signals", lambda: None)
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize(("job", "folder"), [("train", "runs/mine"), ("score", "runs/mine-score-gradient")])
def test_a_launched_script_runs_its_module(ready, own_environment, monkeypatch, job, folder):
    calls = []
    module = types.ModuleType(f"speft_ds.{job}")
    module.run = lambda recipe, *start: calls.append(recipe)
    monkeypatch.setitem(sys.modules, f"speft_ds.{job}", module)
    monkeypatch.setattr(sys, "argv", ["script", "--local_rank=0", "--recipe", "mine.yaml", "seed=3"])
    with pytest.raises(SystemExit) as left:
        launch.start(job, "What it does.")
    (recipe,) = calls
    assert left.value.code == 0 and (recipe.output_dir, recipe.seed) == (folder, 3)


def test_an_error_of_the_run_is_shown_without_a_traceback(ready, own_environment, monkeypatch, capsys):
    def run(recipe, start):
        raise UserError("the loss is nan", "training", "lower optimizer.lr")

    module = types.ModuleType("speft_ds.jobs.train")
    module.run = run
    monkeypatch.setitem(sys.modules, "speft_ds.jobs.train", module)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "mine.yaml"])
    assert launch.main("train", parse_arguments("train", "")) == 2
    assert capsys.readouterr().err.startswith("the loss is nan\n    where: training")


def test_ctrl_c_ends_a_rank_quietly(ready, own_environment, monkeypatch, capsys):
    def run(recipe, start):
        raise KeyboardInterrupt

    module = types.ModuleType("speft_ds.jobs.train")
    module.run = run
    monkeypatch.setitem(sys.modules, "speft_ds.jobs.train", module)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "mine.yaml"])
    assert launch.main("train", parse_arguments("train", "")) == 130
    assert capsys.readouterr() == ("", "")


# Help and usage errors


@pytest.mark.parametrize("job", ["train", "score"])
def test_help_without_torch(stub, job):
    done = started(job, stub, "--local_rank=0", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    examples = ["one GPU", "eight GPUs", "two nodes", "--hostfile hosts.txt", "on the CPU", "mask."]
    for part in [f"launch/{job}.py --recipe RECIPE", *examples, "speft schema", "exit codes:", "  2    "]:
        assert part in done.stdout
    assert "local_rank" not in done.stdout  # the launcher's own


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--recipe"], 2), (["--x=1"], 2)])
def test_other_ranks_say_nothing(stub, monkeypatch, arguments, code):
    done = started("train", stub, "--local_rank=1", *arguments, RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def launched(*arguments):
    """The script under the real launcher, on two ranks: (exit code, lines)."""
    command = [find_deepspeed(), "--num_gpus", "2", *arguments]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_help_is_printed_once_under_the_launcher():
    code, lines = launched("launch/train.py", "--help")
    assert code == 0 and lines.count("exit codes:") == 1
    assert sum(line.startswith("usage:") for line in lines) == 1


def test_a_usage_error_is_printed_once_under_the_launcher():
    code, lines = launched("launch/score.py", "mask.density=0.01")
    assert code == 2 and sum("required: --recipe" in line for line in lines) == 1
    assert sum(line.startswith("usage:") for line in lines) == 1
