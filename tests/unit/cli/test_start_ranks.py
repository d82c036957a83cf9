"""Jobs that `speft` starts: the launcher's command line, on which ranks, and how they end."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import types

import pytest
from limits import HANG_S

from speft_ds.cli import main as cli
from speft_ds.cli import start_ranks
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from unit.written import write_inputs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Run a command with the preparation and the launcher replaced; returns (command, env, code)."""

    def prepare():
        cache = tmp_path / "cache" / "speft_ds"
        (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (cache / "SmolLM2-135M-Instruct" / file).write_text("{}")
        (cache / "quickstart" / "tasks").mkdir(parents=True)
        (cache / "quickstart" / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')

    calls = []

    def run(command, env):
        calls.append((command, env))
        return run.code

    run.code = 0
    module = types.ModuleType("speft_ds.tools.quickstart")
    module.prepare = prepare
    monkeypatch.setitem(sys.modules, "speft_ds.tools.quickstart", module)
    monkeypatch.setattr(start_ranks, "find_deepspeed", lambda: "deepspeed")
    monkeypatch.setattr(start_ranks, "run_to_end", run)
    monkeypatch.setattr(start_ranks, "free_port", lambda: 4711)

    def start(*arguments, name="quickstart", gpus=0, code=0):
        run.code = code
        monkeypatch.setattr(start_ranks, "count_gpus", lambda: gpus)
        monkeypatch.setattr(sys, "argv", ["speft", name, *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (*(calls[-1] if calls else (None, None)), left.value.code)

    return start


PORT = ["--master_port", "4711"]
TRAIN = [*PORT, str(ROOT / "launch" / "train.py"), "--recipe", "quickstart"]


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


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), (143, 143)])
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
    write_inputs(tmp_path)
    return lambda *arguments, **machine: launched("mine.yaml", *arguments, name="score", **machine)


SCORE = [*PORT, str(ROOT / "launch" / "score.py"), "--recipe", "mine.yaml"]


def test_score_runs_on_two_cpu_ranks_or_all_gpus(scored):
    command, env, code = scored("mask.salience=snip")
    assert command == ["deepspeed", "--num_gpus", "2", *SCORE, "mask.salience=snip"]
    assert env["DS_ACCELERATOR"] == "cpu" and code == 0
    assert scored(gpus=8)[0] == ["deepspeed", *SCORE]
    assert scored("--ranks", "3", gpus=8)[0] == ["deepspeed", "--num_gpus", "3", *SCORE]  # no batch to share
    assert scored(code=143)[2] == 143


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


# The machine


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
    assert start_ranks.count_gpus() == count


def test_a_missing_launcher_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install deepspeed"):
        start_ranks.find_deepspeed()


# How jobs end


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_exit_codes_are_as_a_shell_reports_them(script, code):
    assert start_ranks.run_to_end(["sh", "-c", script], dict(os.environ)) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_launcher_and_its_ranks_quietly(tmp_path, number, code):
    """The launcher here ends at once, its rank a second later, as with deepspeed."""
    rank = """
        import pathlib, signal, sys, time
        def save(*_):
            time.sleep(1)
            pathlib.Path("saved").touch()
            sys.exit()
        signal.signal(signal.SIGTERM, save)
        pathlib.Path("started").touch()
        time.sleep(3600)
    """
    (tmp_path / "rank.py").write_text(textwrap.dedent(rank))
    script = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from speft_ds.cli.start_ranks import run_to_end
        sys.exit(run_to_end(["sh", "-c", "{sys.executable} rank.py & wait"], dict(os.environ)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + HANG_S
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=HANG_S)
    assert (process.returncode, output) == (code, "")
    assert (tmp_path / "saved").exists()  # waited for
