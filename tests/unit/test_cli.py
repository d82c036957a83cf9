"""The `speft` commands, what those that launch would run, and what the launched scripts do first."""

import os
import stat
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import yaml

from speft_ds import cli, entry
from speft_ds.errors import UserError
from speft_ds.recipe import ROOT, list_recipes
from unit.written import MINIMAL


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def speft(*arguments):
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "speft_ds.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_ls_lists_every_recipe():
    done = speft("ls")
    assert done.returncode == 0
    assert all(name in done.stdout for name in list_recipes())
    assert "SmolLM2-135M-Instruct" in done.stdout and "0.500%" in done.stdout
    assert "A first sparse fine-tuning run" in done.stdout


def test_ls_names_a_recipe_that_does_not_load(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.yaml").write_text("seed: x")
    monkeypatch.setattr("speft_ds.recipe.RECIPES_DIR", tmp_path)
    cli.ls()
    assert "does not load" in capsys.readouterr().out


def test_show_prints_the_resolved_recipe():
    done = speft("show", "quickstart", "mask.density=0.01", "mask.targets=[a, b]")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["mask"]["density"] == 0.01 and shown["mask"]["targets"] == ["a", "b"]
    assert shown["optimizer"]["clip_norm"] == 1.0  # a default


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "quickstrat"], "did you mean quickstart?"),
        (["show", "quickstart", "mask.desnity=1", "seed=x"], "2 problems"),
        (["quickstart", "mask.desnity=1"], "did you mean mask.density?"),  # before anything is prepared
        (["score", "quickstrat"], "did you mean quickstart?"),
        (["score", "quickstart", "mask.desnity=1"], "did you mean mask.density?"),
        (["compare-masks", "a/mask.safetensors"], "speft compare-masks a/mask.safetensors runs/other"),
    ],
)
def test_user_errors_have_no_traceback_and_exit_with_2(arguments, said):
    done = speft(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("command", ["ls", "show", "quickstart", "score", "compare-masks"])
def test_every_command_has_help(command):
    done = speft(command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    if command in ("quickstart", "score", "compare-masks"):
        assert f"Example: speft {command} " in done.stdout


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Run a command with the preparation and the launcher replaced; returns (command, env, code)."""

    def prepare():
        cache = tmp_path / "cache" / "speft_ds"
        (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
        (cache / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
        (cache / "quickstart" / "tasks").mkdir(parents=True)
        (cache / "quickstart" / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')

    calls = []

    def run(command, env, check):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, run.code)

    run.code = 0
    module = types.ModuleType("speft_ds.quickstart")
    module.prepare = prepare
    monkeypatch.setitem(sys.modules, "speft_ds.quickstart", module)
    monkeypatch.setattr(cli, "_find_deepspeed", lambda: "deepspeed")

    def start(*arguments, name="quickstart", gpus=0, code=0):
        run.code = code
        monkeypatch.setattr(cli, "count_gpus", lambda: gpus)
        monkeypatch.setattr(sys, "argv", ["speft", name, *arguments])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(cli.subprocess, "run", run)
            cli.main()
        return (*(calls[-1] if calls else (None, None)), left.value.code)

    return start


TRAIN = [str(ROOT / "launch" / "train.py"), "--recipe", "quickstart"]


def test_without_gpus_two_cpu_ranks(launched):
    command, env, code = launched()
    assert command == ["deepspeed", "--num_gpus", "2", *TRAIN, "output_dir=runs/quickstart"]
    assert env["DS_ACCELERATOR"] == "cpu" and env["OMP_NUM_THREADS"].isdigit()
    assert env["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    assert code == 0


def test_with_gpus_the_launcher_takes_them_all(launched):
    command, env, _ = launched(gpus=2)
    assert command == ["deepspeed", *TRAIN, "output_dir=runs/quickstart"]
    assert env.get("DS_ACCELERATOR") == os.environ.get("DS_ACCELERATOR")


def test_ranks_and_overrides_are_passed_on(launched):
    command, _, _ = launched("--ranks", "1", "train.steps=3", "optimizer.warmup_steps=0", gpus=2)
    assert command[:3] == ["deepspeed", "--num_gpus", "1"]
    assert command[-2:] == ["train.steps=3", "optimizer.warmup_steps=0"]


def test_many_ranks_get_a_smaller_micro_batch(launched, capsys):
    command, _, _ = launched(gpus=8)
    assert command[-1] == "train.micro_batch=2"
    assert "for 8 ranks: train.micro_batch=2" in capsys.readouterr().out


def test_ranks_that_cannot_share_the_batch_are_refused(launched, capsys):
    command, _, code = launched("--ranks", "3")
    assert command is None and code == 2
    assert "train.global_batch=24" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), (-15, 143)])
def test_the_exit_code_is_the_launchers(launched, code, expected):
    assert launched(code=code)[2] == expected


def test_prepare_only_launches_nothing(launched, tmp_path):
    assert launched("--prepare-only") == (None, None, 0)
    assert (tmp_path / "cache" / "speft_ds" / "quickstart" / "train.jsonl").is_file()


def test_a_used_run_folder_is_left_alone(launched, tmp_path, capsys):
    for name in ("quickstart", "quickstart-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    command, _, _ = launched()
    assert "output_dir=runs/quickstart-3" in command
    assert "runs/quickstart is not empty: this run goes to runs/quickstart-3" in capsys.readouterr().out


def test_a_run_folder_of_the_users_choice_is_taken_as_it_is(launched, tmp_path, capsys):
    command, _, _ = launched("output_dir=mine")
    assert command[-1] == "output_dir=mine" and "output_dir=runs/quickstart" not in command


def test_a_used_run_folder_of_the_users_choice_is_refused(launched, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    command, _, code = launched("output_dir=mine")
    assert command is None and code == 2
    assert "mine is not empty" in capsys.readouterr().err


# speft score


@pytest.fixture
def scored(launched, tmp_path):
    """Run `speft score mine.yaml` for a recipe whose inputs are all there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "mine.yaml").write_text(MINIMAL.replace("owner/name", "./model"))
    return lambda *arguments, **machine: launched("mine.yaml", *arguments, name="score", **machine)


SCORE = [str(ROOT / "launch" / "score.py"), "--recipe", "mine.yaml"]


def test_score_runs_on_two_cpu_ranks_or_all_gpus(scored):
    command, env, code = scored("mask.salience=snip")
    assert command == ["deepspeed", "--num_gpus", "2", *SCORE, "mask.salience=snip"]
    assert env["DS_ACCELERATOR"] == "cpu" and code == 0
    assert scored(gpus=8)[0] == ["deepspeed", *SCORE]
    assert scored("--ranks", "3", gpus=8)[0] == ["deepspeed", "--num_gpus", "3", *SCORE]  # no batch to share
    assert scored(code=-15)[2] == 143


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.path=null"], "mask.salience=gradient needs calibration data"),
        (["model.name_or_path=./nowhere"], "no model folder ./nowhere"),
        (["mask.load=mask.safetensors"], "leaves nothing to score"),
        (["mask.salience=grasp"], "model.dtype=float32"),
        (["mask.salience=snip"], "runs/mine-score-snip is not empty"),
        (["output_dir=used"], "used is not empty"),
    ],
)
def test_score_refuses_before_launching(scored, tmp_path, capsys, arguments, said):
    for folder in ("runs/mine-score-snip", "used"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "score.json").write_text("{}")
    command, _, code = scored(*arguments)
    assert command is None and code == 2
    assert said in capsys.readouterr().err


def test_a_trained_run_is_not_in_the_way_of_scoring(scored, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    assert scored()[2] == 0


# speft compare-masks


def test_compare_masks_hands_over_the_paths(monkeypatch):
    calls = []
    module = types.ModuleType("speft_ds.compare")
    module.compare = lambda paths, output: calls.append((paths, output))
    monkeypatch.setitem(sys.modules, "speft_ds.compare", module)
    for arguments in (["a", "b/mask.safetensors", "--output", "c.png"], ["a", "b", "c"]):
        monkeypatch.setattr(sys, "argv", ["speft", "compare-masks", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
    a, b, c = Path("a"), Path("b"), Path("c")
    assert calls == [([a, b / "mask.safetensors"], Path("c.png")), ([a, b, c], None)]


# What the launcher starts


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
def test_a_launched_script_checks_before_it_imports_torch(scored, tmp_path, job, arguments, code, said):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "run.json").write_text("{}")
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    command = [sys.executable, str(ROOT / "launch" / f"{job}.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "") and said in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.fixture
def own_environment():
    """A run sets variables for the libraries; other tests should not see them."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize(("job", "folder"), [("train", "runs/mine"), ("score", "runs/mine-score-gradient")])
def test_a_launched_script_runs_its_module(scored, own_environment, monkeypatch, job, folder):
    calls = []
    module = types.ModuleType(f"speft_ds.{job}")
    module.run = calls.append
    monkeypatch.setitem(sys.modules, f"speft_ds.{job}", module)
    monkeypatch.setattr(sys, "argv", ["script", "--local_rank=0", "--recipe", "mine.yaml", "seed=3"])
    with pytest.raises(SystemExit) as left:
        entry.start(job, "What it does.")
    (recipe,) = calls
    assert left.value.code == 0 and (recipe.output_dir, recipe.seed) == (folder, 3)


def test_an_error_of_the_run_is_shown_without_a_traceback(scored, own_environment, monkeypatch, capsys):
    def run(recipe):
        raise UserError("the loss is nan", "training", "lower optimizer.lr")

    module = types.ModuleType("speft_ds.train")
    module.run = run
    monkeypatch.setitem(sys.modules, "speft_ds.train", module)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "mine.yaml"])
    assert entry.main("train", entry.parse_arguments("train", "")) == 2
    assert capsys.readouterr().err.startswith("the loss is nan\n    where: training")


@pytest.mark.parametrize(
    ("script", "visible", "count"),
    [
        ("echo 'GPU 0: x'; echo '  MIG 1g: y'; echo 'GPU 1: x'", None, 2),
        ("echo 'GPU 0: x'; echo 'GPU 1: x'", "1", 1),
        ("echo 'GPU 0: x'", "", 0),
        ("echo 'GPU 0: x'; exit 9", None, 0),
        (None, None, 0),
    ],
)
def test_gpus_are_counted_without_torch(tmp_path, monkeypatch, script, visible, count):
    (tmp_path / "bin").mkdir()
    if script:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli.count_gpus() == count


def test_a_missing_launcher_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install deepspeed"):
        cli._find_deepspeed()
