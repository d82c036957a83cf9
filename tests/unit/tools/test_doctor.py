"""`speft doctor`: every failure for real where this machine can have it, and the report."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from speft_ds.comm import deepspeed_shm
from speft_ds.config.load_recipe import ROOT
from speft_ds.tools import doctor
from speft_ds.tools.doctor import Check, run_group

TOKEN = "hf_notAtokenForAnybody"
# What would change the report of a machine.
STRANGE = re.compile(
    "CXX|DS_ACCELERATOR|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|MASTER_ADDR|TORCH_EXTENSIONS_DIR|"
    "TRANSFORMERS_OFFLINE|(HF|HUGGING|GLOO)_.*|.*_proxy",
    re.IGNORECASE,
)
LIMIT_S = 500  # guards against hanging


@pytest.fixture(autouse=True)
def _plain_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in filter(STRANGE.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def found(checks, name):
    (check,) = [check for check in checks if check.name == name]
    assert (check.status in ("warning", "problem")) == (check.fix is not None)
    return check


# The report


def test_this_machine_is_ready():
    """A piped report of the command: plain text, without the token."""
    code = f"""
import sys
from speft_ds.cli.main import main
from speft_ds.tools import doctor
doctor.examine.__defaults__ = ({LIMIT_S},)
sys.argv[1:] = ["doctor"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    env = {key: value for key, value in os.environ.items() if not STRANGE.fullmatch(key)}
    env |= {"HF_TOKEN": TOKEN, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    report = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert report.returncode == 0, report.stdout + report.stderr
    lines = report.stdout.splitlines()
    status = {line[9:].split("  ")[0]: line[:9].strip() for line in lines[1:-1] if line[:1].strip()}
    for name in ("python", "packages", "C++ compiler", "torch build", "DeepSpeed", "2 ranks, gloo"):
        assert status[name] == "ok"
    (packages,) = [line for line in lines if line.startswith("ok       packages ")]
    assert ", torch " in packages.replace("  ", ", ") and ", lm-eval " in packages
    assert ", pytest " not in packages and ", peft " not in packages  # extras
    assert status.keys() >= {"ninja", "GPUs", "build lock", "/dev/shm", "hub", "memory", "cores", "SLURM"}
    assert lines[0].startswith("ready")
    assert report.stdout.isascii() and "\x1b" not in report.stdout and "hub token" in report.stdout
    assert TOKEN not in report.stdout + report.stderr


CHECKS = [
    Check("a", "ok", "fine"),
    Check("long name", "warning", "[red]so so[/red]", "type this"),
    Check("c", "skipped", "no GPU"),
    Check("d", "problem", "broken " * 30, "fix it"),
]


def test_a_terminal_gets_the_same_lines_in_color(capsys):
    doctor.print_report(CHECKS)
    plain = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    marks = [line.split()[0] for line in plain[1:-1]]
    assert marks == ["problem", "fix:", "warning", "fix:", "ok", "skipped"]  # the worst first
    assert "[red]so so[/red]" in plain[3] and "type this" in plain[4] and plain[0].startswith("NOT")
    assert doctor.exit_code(CHECKS) == 1 and doctor.exit_code(CHECKS[:3]) == 0  # a warning does not fail

    main, terminal = pty.openpty()
    code = f"from speft_ds.tools.doctor import *; print_report({CHECKS!r})"
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    env.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=env, check=True)
    os.close(terminal)
    shown = os.read(main, 10_000).decode().replace("\r", "")
    os.close(main)
    without_color = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert without_color != shown
    assert all(len(line) <= 80 for line in without_color.splitlines()[:-1])
    assert without_color.split() == " ".join(plain).split()


# The installation


def test_packages_out_of_range_or_missing(tmp_path, monkeypatch):
    wanted = ["rich>=99", "pydantic<1,>=0.5", "no-such-package>=2", "numpy>=1"]
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {json.dumps(wanted)}")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    checks = list(doctor.check_packages())
    assert [check.status for check in checks] == ["ok", "problem", "problem", "problem", "ok"]
    for check, name in zip(checks[1:4], ("rich>=99", "pydantic<1", "no-such-package>=2"), strict=True):
        assert name in check.what and name in check.fix


@pytest.mark.parametrize(
    ("group", "code", "limit_s", "said"),
    [
        ("torch", "raise ImportError('libtorch.so: undefined symbol')", LIMIT_S, "undefined symbol"),
        ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", LIMIT_S, "SIGSEGV"),
        ("torch", "import time; time.sleep(600)", 3, "3 s"),
        ("deepspeed", "raise RuntimeError('CUDA_HOME does not exist')", LIMIT_S, "CUDA_HOME does not exist"),
        ("huggingface_hub", "raise ImportError('gone')", LIMIT_S, "gone"),
    ],
)
def test_a_package_that_does_not_import_crashes_or_hangs(tmp_path, monkeypatch, group, code, limit_s, said):
    (tmp_path / "stub" / group).mkdir(parents=True)
    (tmp_path / "stub" / group / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stub"), str(ROOT)]))
    name = {"deepspeed": "DeepSpeed", "huggingface_hub": "hub"}.get(group, group)
    check = found(run_group(name, limit_s), name)
    assert check.status == "problem" and said in check.what
    assert "pip install" in check.fix and group in check.fix


def test_what_was_checked_before_a_crash_is_kept(tmp_path, monkeypatch):
    script = """echo '{"name": "a", "status": "ok", "what": "b"}'; exit 1"""
    monkeypatch.setattr(sys, "executable", str(executable(tmp_path / "python", script)))
    first, crash = run_group("machine", LIMIT_S)
    assert first == Check("a", "ok", "b") and (crash.name, crash.status) == ("machine", "problem")


DROP = 'for a; do shift; case "$a" in -I*) ;; *) set -- "$@" "$a";; esac; done\nexec c++ "$@"'
OLD = "echo \"c++: error: unrecognized command-line option '-std=c++20'\" >&2; exit 1"


@pytest.mark.parametrize(
    ("script", "said", "fix"),
    [(None, "No such file", "CXX="), (DROP, "Python.h", "python3-dev"), (OLD, "-std=c++20", "g++ 11")],
)
def test_a_compiler_that_cannot_build(tmp_path, monkeypatch, script, said, fix):
    compiler = tmp_path / "cxx"
    monkeypatch.setenv("CXX", str(executable(compiler, script) if script else compiler))
    check = found(doctor.check_build_tools(), "C++ compiler")
    assert check.status == "problem" and said in check.what and fix in check.fix


def test_ninja_that_is_not_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(doctor.check_build_tools(), "ninja")
    assert check.status == "warning" and "activate" in check.fix


# GPUs: torch's are made up


LISTED = ["H100, 81559 MiB, 580.1"] * 2


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Has nvidia-smi list two GPUs, and torch see `seen` of them; returns the checks."""
    import torch

    def check(seen, cuda="13.0", computes=True, **environment):
        executable(tmp_path / "bin" / "nvidia-smi", "\n".join(f"echo '{line}'" for line in LISTED))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        fakes = {"is_available": seen > 0, "device_count": seen, "is_bf16_supported": True}
        for name, value in {**fakes, "get_device_name": "H100"}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **options: value)
        ones = torch.ones
        if computes:
            monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
        return list(doctor.check_torch())

    return check


def test_gpus_that_compute(gpus):
    checks = gpus(2)
    assert {check.status for check in checks} == {"ok"}
    assert found(checks, "GPU 1") and LISTED[0] in found(checks, "GPUs").what


@pytest.mark.parametrize(
    ("seen", "cuda", "environment", "status"),
    [
        (0, None, {}, "problem"),
        (0, "13.0", {}, "problem"),
        (1, "13.0", {}, "warning"),
        (1, "13.0", {"CUDA_VISIBLE_DEVICES": "1"}, "ok"),
        (0, None, {"DS_ACCELERATOR": "cpu"}, "ok"),
    ],
)
def test_gpus_that_torch_does_not_see(gpus, seen, cuda, environment, status):
    check = found(gpus(seen, cuda, **environment), "GPUs")
    assert check.status == status and f"{seen} of 2" in check.what
    assert all(f"{name}={value}" in check.what for name, value in environment.items())
    assert check.fix is None or (f"CUDA {cuda}" if cuda else "the CPU") in check.fix


def test_a_gpu_that_does_not_compute(gpus):
    with pytest.raises((RuntimeError, AssertionError)):  # which the report shows
        gpus(2, computes=False)


def test_an_nvidia_smi_that_fails(tmp_path, monkeypatch):
    executable(tmp_path / "nvidia-smi", "echo 'NVML: version mismatch'; exit 18")  # on its stdout
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda *_: [Path("/dev/nvidia0")])
    (gpu,) = doctor.list_gpus()
    assert "/dev/nvidia0" in gpu and "version mismatch" in gpu


# DeepSpeed and two ranks


def test_the_lock_of_a_build_and_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert found(doctor.check_deepspeed(), "build lock").status == "ok"
    lock = tmp_path / deepspeed_shm.NAME / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert found(doctor.check_deepspeed(), "build lock").status == "ok"
    os.utime(lock, (time.time() - 3600,) * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=131 * 2**20))
    checks = list(doctor.check_deepspeed())
    stale, memory = found(checks, "build lock"), found(checks, "/dev/shm")
    assert stale.status == "warning" and stale.fix.endswith(f"rm -r {lock.parent}")
    assert memory.status == "problem" and "--shm-size=2g" in memory.fix


def die_as_rank_1(rank, backend, port):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_rank_that_dies(monkeypatch):
    monkeypatch.setattr(doctor, "add_as_rank", die_as_rank_1)
    (check,) = doctor.check_collectives()
    assert check.status == "problem" and "process 1" in check.what and "SIGKILL" in check.what
    assert "GLOO_SOCKET_IFNAME=lo" in check.fix
    assert not [child for child in psutil.Process().children() if "spawn_main" in str(child.cmdline())]


def test_an_interface_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    (check,) = doctor.check_collectives()
    assert check.status == "problem" and "nope0" in check.what


def test_a_wrong_sum_is_noticed(monkeypatch):
    import torch.distributed as dist

    from speft_ds.comm import collectives

    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(collectives, "all_reduce", lambda tensor: tensor)
    monkeypatch.setattr(collectives, "start_reduce_scatter", lambda pieces: lambda: pieces[0])
    with pytest.raises(RuntimeError, match="sums"):
        doctor.add_as_rank(0, "gloo", 1)


# The machine


def test_a_hub_that_is_reachable_or_not(ports, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:secret@127.0.0.1:{ports[0]}")
    check = found(doctor.check_hub(), "hub")
    assert check.status == "ok" and "127.0.0.1" in check.what and "secret" not in check.what
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{ports[1]}")
    check = found(doctor.check_hub(), "hub")
    assert check.status == "warning" and "refused" in check.what and "HF_HUB_OFFLINE=1" in check.fix
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert found(doctor.check_hub(), "hub").status == "ok"


def test_the_hubs_folder_and_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    without = found(run_group("hub", LIMIT_S), "hub token")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    checks = run_group("hub", LIMIT_S)
    assert found(checks, "hub token").what != without.what and TOKEN not in str(checks)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "token"))
    check = found(run_group("hub", LIMIT_S), "HF_HOME")
    assert check.status == "problem" and "export HF_HOME=" in check.fix


def test_folders_that_are_small_or_cannot_be_written(tmp_path, monkeypatch):
    assert doctor.check_folder("cache", tmp_path / "a" / "b", "CACHE", 0).status == "ok"
    assert not list(tmp_path.iterdir())
    assert doctor.check_folder("cache", tmp_path, "CACHE", 1e9).status == "warning"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "file"))
    check = found(doctor.check_machine(), "speft_ds cache")
    assert check.status == "problem" and "export SPEFT_DS_CACHE=" in check.fix


def test_limits_of_control_groups(tmp_path):
    root, own = tmp_path / "root", tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert doctor.cgroup_limits(root, own) == (float("inf"), float("inf"))
    (root / "job" / "step").mkdir(parents=True)
    (root / "job" / "memory.max").write_text("4294967296\n")
    (root / "job" / "step" / "memory.max").write_text("max\n")
    (root / "job" / "cpu.max").write_text("max 100000\n")
    (root / "job" / "step" / "cpu.max").write_text("150000 100000\n")
    assert doctor.cgroup_limits(root, own) == (2**32, 1.5)


@pytest.mark.parametrize(
    ("limits", "threads", "memory", "cores"),
    [
        ((2**30, 0.5), None, "warning", "warning"),
        ((2**60, 0.5), "1", None, "ok"),
        ((2**60, 2**60), "9999", None, "warning"),
    ],
)
def test_memory_and_cores(monkeypatch, limits, threads, memory, cores):
    monkeypatch.setattr(doctor, "cgroup_limits", lambda *_: limits)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    checks = list(doctor.check_machine())
    assert memory in (None, found(checks, "memory").status)
    assert found(checks, "cores").status == cores


def test_open_files_and_slurm(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(doctor.check_machine(), "SLURM").status == "skipped"
    executable(tmp_path / "sbatch", "exit 1")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        checks = list(doctor.check_machine())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found(checks, "open files").fix == "ulimit -n 4096" and found(checks, "SLURM").status == "ok"
