"""Jobs that `speft` starts: the launcher's command line, on which ranks, and how they end."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
from limits import HANG_S

from speft_ds.cli import start_ranks
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from unit.commands import run
from unit.written import write_inputs


@pytest.fixture(autouse=True)
def _machine(own_folder, tmp_path, monkeypatch):
    """A folder of its own with mine.yaml and its inputs, and an empty cache."""
    write_inputs(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Run a command with the preparation and the launcher replaced; returns (command, env, code)."""
    cache, calls = tmp_path / "cache" / "speft_ds", []
    (cache / "quickstart" / "tasks").mkdir(parents=True)
    (cache / "quickstart" / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (cache / "SmolLM2-135M-Instruct").symlink_to(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "speft_ds.tools.quickstart", mock.MagicMock())
    monkeypatch.setattr(start_ranks, "find_deepspeed", lambda: "deepspeed")
    monkeypatch.setattr(start_ranks, "free_port", lambda: 4711)

    def start(typed, gpus=0, code=0):
        monkeypatch.setattr(start_ranks, "visible_gpus", lambda: list(range(gpus)))
        monkeypatch.setattr(start_ranks, "run_to_end", lambda *call: calls.append(call[:2]) or code)
        left = run(monkeypatch, *typed.split())
        return (*(calls[-1] if calls else (None, None)), left)

    return start


def use(folder):
    """Make a run folder that is not empty."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")


QUIET = ["--log_level", "critical"]


def script(job, *words):
    return ["--master_port", "4711", *QUIET, str(ROOT / "launch" / f"{job}.py"), *words]


QUICK = script("train", "--recipe", "quickstart", "output_dir=runs/quickstart")
TRAIN, SCORE = script("train", "--recipe", "mine.yaml"), script("score", "--recipe", "mine.yaml")
HERE, MODEL = ["output_dir=here"], ["--model=./model", "--tasks=a,b"]


@pytest.mark.parametrize(
    ("typed", "gpus", "expected"),
    [
        ("quickstart", 0, ["--num_gpus", "2", *QUICK]),  # two ranks on the CPU
        ("quickstart", 2, QUICK),  # the launcher takes all GPUs
        ("quickstart --ranks 1 seed=3", 2, ["--num_gpus", "1", *QUICK, "seed=3"]),
        ("quickstart", 8, [*QUICK, "train.micro_batch=2"]),  # many ranks get a smaller one
        ("score mine.yaml mask.salience=snip", 0, ["--num_gpus", "1", *SCORE, "mask.salience=snip"]),
        ("score mine.yaml", 8, SCORE),
        ("score mine.yaml --ranks 3", 8, ["--num_gpus", "3", *SCORE]),  # no batch to share
        ("train mine.yaml output_dir=here", 0, ["--num_gpus", "1", *TRAIN, *HERE]),
        ("train mine.yaml output_dir=here --ranks 2", 4, ["--num_gpus", "2", *TRAIN, *HERE]),
        ("train output_dir=here --resume auto mine.yaml", 2, None),  # the recipe comes first
        ("train mine.yaml --resume auto output_dir=here", 2, [*TRAIN, *HERE, "--resume=auto"]),
        (
            "train mine.yaml output_dir=here --hostfile hosts.txt",
            0,
            ["--hostfile", "hosts.txt", *TRAIN, *HERE],
        ),
        ("train mine.yaml output_dir=here --hostfile hosts.txt --ranks 2", 0, None),
        ("train mine.yaml --hostfile rows.jsonl", 0, None),
        ("train mine.yaml", 0, None),  # its run folder is used
        ("train", 0, None),
        ("train seed=1 --resume", 0, None),
        ("train mine.yaml --resume-with seed=1", 0, None),
        (
            "evaluate --model ./model --tasks a,b --limit 3 eval.batch_size=2",
            0,
            ["--num_gpus", "1", *script("evaluate", *MODEL, "--limit=3", "eval.batch_size=2")],
        ),
        ("evaluate", 0, None),
        ("evaluate runs/mine --model ./model", 0, None),
        ("evaluate runs/mine --adapter a", 0, None),
        ("evaluate runs/mine --tasks a", 0, None),  # no run with an adapter
    ],
)
def test_the_launchers_command_line(launched, tmp_path, typed, gpus, expected, monkeypatch, capsys):
    """None: what is typed is refused, before a rank is started."""
    use(tmp_path / "runs" / "mine")  # a trained run is not in the way of a score
    for tool in ("ssh", "pdsh"):
        shutil.copy("/bin/true", tmp_path / tool)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts.txt").write_text("# two machines\nnode1 slots=1\nme@node-2.lan slots=1  # old\n")
    command, env, code = launched(typed, gpus=gpus)
    if expected is None:
        shown = capsys.readouterr().err
        assert command is None and code == 2 and "fix: " in shown and "Traceback" not in shown
        return
    assert command == ["deepspeed", *expected, "--checked"] and code == 0
    on_cpu = not gpus and "--hostfile" not in typed
    assert env.get("DS_ACCELERATOR") == ("cpu" if on_cpu else os.environ.get("DS_ACCELERATOR"))
    assert env["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none",
        "node1",
        "node1 slots=0",
        "-oProxyCommand=x slots=1",
        "a slots=1\na slots=2",
        "a;b slots=1",
        pytest.param(f"a slots={'9' * 5000}", id="huge"),
    ],
)
def test_a_hostfile_that_deepspeed_would_not_take_is_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        start_ranks.read_hostfile(tmp_path / "hosts")
    assert str(tmp_path / "hosts") in caught.value.where and "slots=8" in caught.value.fix


def test_machines_that_cannot_be_reached_are_no_traceback_of_the_launcher(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("node1 slots=2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        start_ranks.choose_ranks(None, tmp_path / "hosts")
    assert "ssh" in caught.value.what and "pdsh" in caught.value.fix


@pytest.mark.parametrize("typed", ["quickstart", "score mine.yaml"])
def test_deepspeeds_own_lines_are_shown_where_they_are_asked_for(launched, typed):
    quiet, verbose = launched(typed)[0], launched(f"{typed} --verbose")[0]
    assert verbose == [word for word in quiet if word not in QUIET]


def test_ranks_that_cannot_share_the_batch_are_refused(launched, capsys):
    command, _, code = launched("quickstart --ranks 3")
    assert command is None and code == 2 and "train.global_batch=24" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 3, 143])
def test_the_exit_code_is_the_launchers(launched, code):
    assert launched("quickstart", code=code)[2] == launched("score mine.yaml", code=code)[2] == code


def test_prepare_only_launches_nothing(launched):
    assert launched("quickstart --prepare-only") == (None, None, 0)
    sys.modules["speft_ds.tools.quickstart"].prepare.assert_called_once_with()


def test_a_used_run_folder_is_left_alone(launched, tmp_path, capsys):
    for name in ("quickstart", "quickstart-2", "mine-score-snip"):
        use(tmp_path / "runs" / name)
    assert "output_dir=runs/quickstart-3" in launched("quickstart")[0]
    assert "runs/quickstart-3" in capsys.readouterr().out
    command, _, _ = launched("quickstart output_dir=mine")  # the user's choice is taken or refused
    assert [word for word in command if word.startswith("output_dir")] == ["output_dir=mine"]
    for refused in ("quickstart output_dir=runs/quickstart", "score mine.yaml mask.salience=snip"):
        assert launched(refused)[2] == 2 and "is not empty" in capsys.readouterr().err


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
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert start_ranks.count_gpus() == count


FOUR = "; ".join(f"echo 'GPU {number}: NVIDIA X (UUID: GPU-{number}{number}ab)'" for number in range(4))


@pytest.fixture
def four_gpus(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists four GPUs."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{FOUR}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, [0, 1, 2, 3]),
        ("2,3", [2, 3]),
        ("3, 0", [3, 0]),
        ("GPU-33ab,GPU-1", [3, 1]),
        ("1,7,2", [1]),  # CUDA sees nothing behind a name that is none
        ("1,1", [1]),
        ("GPU-,0", []),  # of four
        *((nothing, []) for nothing in ("", "-1", "NoDevFiles", "none", "x" * 10_000, "0x1")),
    ],
)
def test_the_gpus_that_are_used_are_those_that_the_user_leaves_visible(four_gpus, monkeypatch, visible, gpus):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert start_ranks.visible_gpus() == gpus
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert start_ranks.visible_gpus() == []


def test_a_part_of_a_gpu_is_refused(four_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(UserError) as caught:
        start_ranks.visible_gpus()
    assert caught.value.where == "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("visible", "ranks", "flags"),
    [
        (None, [], []),
        (None, ["--ranks", "2"], ["--num_gpus", "2"]),
        ("2,3", [], ["--include", "localhost:2,3"]),
        ("GPU-33,GPU-11", ["--ranks", "1"], ["--include", "localhost:3"]),
        ("", ["--ranks", "2"], ["--num_gpus", "2"]),
        ("-1", ["--ranks", "1"], ["--num_gpus", "1"]),
    ],
)
def test_the_launcher_is_told_which_gpus(four_gpus, monkeypatch, visible, ranks, flags):
    """With --num_gpus it takes the first ones of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    calls = []
    monkeypatch.setattr(start_ranks, "run_to_end", lambda *call: calls.append(call[:2]) or 0)
    assert run(monkeypatch, "score", "mine.yaml", *ranks) == 0
    ((command, env),) = calls
    assert command[1 : command.index("--master_port")] == flags and "CUDA_VISIBLE_DEVICES" not in env
    assert (env.get("DS_ACCELERATOR") == "cpu") == (visible in ("", "-1"))


def test_more_ranks_than_gpus_are_refused(four_gpus, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run(monkeypatch, "score", "mine.yaml", "--ranks", "3") == 2
    assert "--ranks 2" in capsys.readouterr().err


def test_a_missing_launcher_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        start_ranks.find_deepspeed()
    assert caught.value.fix == "pip install deepspeed"


# How jobs end


@pytest.mark.parametrize(
    ("script", "code"),
    [("true", 0), ("exit 3", 3), ("exit 85", 85), ("kill -9 $$", 137), ("exit 247", 137), ("exit 241", 143)],
)
def test_exit_codes_are_as_a_shell_reports_them(script, code):
    assert start_ranks.run_to_end(["sh", "-c", script], dict(os.environ)) == code


RANK = """
    import pathlib, signal, sys, time
    def save(*_):
        time.sleep(1)
        pathlib.Path("saved").touch()
        sys.exit(85)
    signal.signal(signal.SIGTERM, save)
    print("begins")
    pathlib.Path("started").touch()
    time.sleep(3600)
"""


def test_a_run_is_stopped_when_it_may_be(tmp_path, monkeypatch):
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    monkeypatch.chdir(tmp_path)
    command = ["sh", "-c", f"{sys.executable} -u rank.py & wait $!; exit $?", "deepspeed.launcher.launch"]
    with open("log", "w") as log:
        code = start_ranks.run_to_end(command, dict(os.environ), Path("started").exists, log)
    assert code == 85 and Path("saved").exists() and Path("log").read_text() == "begins\n"


@pytest.mark.parametrize(
    ("number", "launcher", "code"),
    [
        (signal.SIGINT, "launcher", 130),  # not one that we know: it is ended, too
        (signal.SIGTERM, "launcher", 143),
        (signal.SIGINT, "deepspeed.launcher.launch", 85),
        (signal.SIGTERM, "deepspeed.launcher.launch", 85),
    ],
)
def test_a_signal_reaches_the_ranks_and_is_waited_for(tmp_path, number, launcher, code):
    """A rank takes a second to stop; the launcher here has its exit code, as deepspeed."""
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    script = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from speft_ds.cli.start_ranks import run_to_end
        launcher = "{sys.executable} rank.py >/dev/null & wait $!; exit $?"
        sys.exit(run_to_end(["sh", "-c", launcher, {launcher!r}], dict(os.environ)))
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
