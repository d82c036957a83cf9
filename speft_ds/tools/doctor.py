"""Checks of this machine and this installation, for `speft doctor`. Imports no torch.

Each group of checks runs in a subprocess with a time limit, since torch, drivers and network drives may crash
or hang; `python -m speft_ds.tools.doctor GROUP` prints its checks as lines of JSON.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from rich.text import Text

from speft_ds import __version__, env, hub
from speft_ds.comm import deepspeed_shm
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import shell
from speft_ds.terminal import Console

MIB, GIB = 2**20, 2**30
CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GROUP_S = 120  # limit of a group
TOOL_S = 60  # limit of a compiler or nvidia-smi, and of one collective
SHM_MIB = 2 * 66  # what DeepSpeed's collectives of 2 CPU ranks map
QUICKSTART_GIB = 10  # 2 CPU ranks with 4.8 GiB each in float32; in bfloat16 they take 3.0 each
PIP = f"{sys.executable} -m pip install --constraint {ROOT / 'constraints.txt'}"
# As DeepSpeed's op; torch 2.13 compiles extensions as C++20, which has `concepts`.
HELLO = "#include <Python.h>\n#include <omp.h>\n#include <concepts>\nint hello() { return 0; }\n"
CHOICES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")  # with which a user may leave GPUs out
# Every status, the worst first.
COLORS = {"problem": "bold red", "warning": "yellow", "ok": "green", "skipped": "dim"}


@dataclass(frozen=True)
class Check:
    """One line of the report, and what to type where something is wrong."""

    name: str
    status: str
    what: str
    fix: str | None = None


def judge(name: str, is_fine: object, what: str, fix: str, otherwise: str = "problem") -> Check:
    """A check that is `ok`, or `otherwise` and comes with a fix."""
    return Check(name, "ok", what) if is_fine else Check(name, otherwise, what, fix)


# The report


def examine(limit_s: float = GROUP_S) -> list[Check]:
    """Run all groups of checks at the same time, each for so many seconds at most."""
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        groups = pool.map(partial(run_group, limit_s=limit_s), GROUPS)
        return [check for checks in groups for check in checks]


def run_group(group: str, limit_s: float) -> list[Check]:
    """The checks of a group; a crash or a hang is a problem itself, after what was checked before it."""
    output, error = run_tool(sys.executable, "-m", "speft_ds.tools.doctor", group, limit_s=limit_s)
    checks = [Check(**json.loads(line)) for line in output.splitlines() if line.startswith('{"name": ')]
    return [*checks, Check(group, "problem", error, GROUPS[group][1])] if error else checks


def run_tool(*command: str, limit_s: float = TOOL_S) -> tuple[str, str | None]:
    """A command's output, and None or why it failed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace"), f"no answer in {limit_s:g} s"
    except OSError as error:
        return "", str(error)
    output, messages = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode < 0:
        return output, f"killed by {signal.Signals(-done.returncode).name}"
    failure = find_error(messages or output) or f"exit code {done.returncode}"
    return output, failure if done.returncode else None


def find_error(messages: str) -> str:
    """The last line that looks like an error, or the last line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:|\w(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1][:300]


def print_report(checks: list[Check]) -> None:
    """Print a verdict, and one line per check with its fix below it, the worst first.

    In color and wrapped on a terminal, else plain text.
    """
    width = max(len(check.name) for check in checks) + 2
    console = Console(highlight=False, force_terminal=sys.stdout.isatty())  # FORCE_COLOR is not for files
    problems, warned = (sum(check.status == status for check in checks) for status in ("problem", "warning"))
    verdict = f"NOT ready, problems to fix: {problems}" if problems else "ready to run"
    console.print(f"{verdict}; warnings: {warned}", style="bold")
    margin = 9 + width
    for check in sorted(checks, key=lambda check: list(COLORS).index(check.status)):
        what = Text(check.what) + Text(f"\nfix: {check.fix}" if check.fix else "")
        lines = what.split()
        if console.is_terminal:
            lines = [part for line in lines for part in line.wrap(console, console.width - margin)]
        for number, line in enumerate(lines):
            start = Text(" " * margin)
            if number == 0:
                start = Text.assemble((f"{check.status:<9}", COLORS[check.status]), f"{check.name:<{width}}")
            console.print(start + line, soft_wrap=True)
    console.print(f"speft_ds {__version__}, {platform.platform()}", soft_wrap=True)


def exit_code(checks: list[Check]) -> int:
    """1 where there is a problem, else 0: a warning does not fail."""
    return int(any(check.status == "problem" for check in checks))


# The installation


def check_packages() -> Iterator[Check]:
    """The installed packages against the ranges in pyproject.toml, without importing them."""
    # The metadata of an editable install is as old as the last `pip install`.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield Check("python", "ok", f"{platform.python_version()}, {sys.executable}")
    fitting = []
    for package in map(Requirement, project["dependencies"]):
        try:
            found = metadata.version(package.name)
            fits = package.specifier.contains(found, prereleases=True)
        except metadata.PackageNotFoundError:
            found, fits = "not installed", False
        if fits:
            fitting.append(f"{package.name} {found}")
        else:
            yield Check(package.name, "problem", f"{found}; needed: {package}", f"{PIP} '{package}'")
    yield Check("packages", "ok", ", ".join(fitting))


def check_build_tools() -> Iterator[Check]:
    """That the compiler which torch calls builds a Python extension as DeepSpeed's op is built; ninja."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hello.cpp"
        source.write_text(HELLO)
        flags = ("-std=c++20", "-fopenmp", "-fPIC", "-shared", f"-I{sysconfig.get_path('include')}")
        _, error = run_tool(compiler, *flags, str(source), "-o", f"{folder}/hello.so")
    fix = "install g++ 11 or newer with OpenMP, or export CXX=ANOTHER"
    if error and "Python.h" in error:
        fix = "install the headers of this Python: apt-get install python3-dev"
    yield judge("C++ compiler", not error, error or f"{compiler} builds a Python extension", fix)

    ninja = shutil.which("ninja")  # `speft` finds the one beside this Python itself
    fix = f"source {Path(sys.executable).parent}/activate, before `deepspeed launch/...`"
    yield judge("ninja", ninja, ninja or "not on the PATH", fix, "warning")


def check_torch() -> Iterator[Check]:
    """That torch imports and sees the driver's GPUs, and that each computes; bf16."""
    import torch

    from speft_ds.model.dtype import bfloat16_cost, multiplies_bfloat16

    with warnings.catch_warnings(record=True) as caught:  # why CUDA does not start is a warning
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    yield Check("torch build", "ok", f"{torch.__version__}, built for {built_for}")

    listed = list_gpus()
    choice = [f"{name}={os.environ[name]}" for name in CHOICES if name in os.environ]
    why = choice or [str(warning.message) for warning in caught]
    what = "; ".join([f"torch sees {num_gpus} of {len(listed)}", *listed[:1], *why])
    fix = f"see nvidia-smi -q and dmesg; install a driver for {built_for}, or a torch for this driver"
    yield judge("GPUs", num_gpus >= len(listed) or choice, what, fix, "warning" if num_gpus else "problem")
    multiplies = multiplies_bfloat16("cuda" if num_gpus else "cpu")
    what = "in hardware" if multiplies else "not in hardware"
    if not num_gpus:
        what += f": a product takes {bfloat16_cost():.2g} times as long as in float32"
    yield judge("bf16", multiplies, what, "model.dtype=float32, or auto, in the recipe", "warning")
    for i in range(num_gpus):  # one too new for this torch, or in another's exclusive use, raises
        torch.ones(8, device=f"cuda:{i}").sum().item()
        yield Check(f"GPU {i}", "ok", f"{torch.cuda.get_device_name(i)} computes")


def list_gpus() -> list[str]:
    """The driver's GPUs, one line each, by nvidia-smi; device files where it is missing or fails."""
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    output, error = run_tool("nvidia-smi", *query)
    if error is None:
        return [line.strip() for line in output.splitlines() if line.strip()]
    return [f"{path} (nvidia-smi: {error})" for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def check_deepspeed() -> Iterator[Check]:
    """That DeepSpeed imports; the op that it compiles for CPU ranks, and the shared memory that they map."""
    import deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    device, backend = get_accelerator().device_name(), get_accelerator().communication_backend_name()
    yield Check("DeepSpeed", "ok", f"imports; accelerator {device}, collectives over {backend}")
    extensions = deepspeed_shm.extensions_folder()
    yield check_folder("torch extensions", extensions, "TORCH_EXTENSIONS_DIR", 0.1)
    # A killed build leaves its lock behind.
    age_s = deepspeed_shm.lock_age_s(extensions / deepspeed_shm.NAME)
    what = "none" if age_s is None else f"a build of DeepSpeed's op took it {age_s:.0f} s ago"
    remove = shell("rm", "-r", extensions / deepspeed_shm.NAME)
    fix = f"that build was killed, and every other one waits for it: {remove}"
    yield judge("build lock", age_s is None or age_s < deepspeed_shm.STALE_S, what, fix, "warning")
    # A rank that finds no space is killed by SIGBUS.
    free_mib = shutil.disk_usage("/dev/shm").free / MIB if os.path.isdir("/dev/shm") else 0
    what = f"{free_mib:,.0f} MiB free; 2 CPU ranks map {SHM_MIB}"
    fix = "in a container: docker run --shm-size=2g; where no run is on: rm /dev/shm/deepspeed_allreduce_*"
    yield judge("/dev/shm", free_mib >= SHM_MIB, what, fix, "problem" if device == "cpu" else "warning")


def check_collectives() -> Iterator[Check]:
    """all_reduce and reduce_scatter of two ranks on this machine, over gloo and, with two GPUs, over NCCL."""
    import torch

    fixes = {"gloo": "export GLOO_SOCKET_IFNAME=lo (several nodes: an interface of `ip -br addr`)"}
    if torch.cuda.device_count() >= 2 and os.environ.get("DS_ACCELERATOR") != "cpu":
        fixes["nccl"] = "look with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1; in a container: --shm-size=2g"
    for backend, fix in fixes.items():
        error = None
        try:
            torch.multiprocessing.spawn(add_as_rank, (backend, env.free_port()), nprocs=2)
        except Exception as failure:  # of one of the ranks; its traceback is the text
            error = find_error(str(failure))
        yield judge(f"2 ranks, {backend}", error is None, error or "all_reduce and reduce_scatter", fix)


def add_as_rank(rank: int, backend: str, port: int) -> None:
    """Join the other rank and add, by the calls that a run makes."""
    import torch
    import torch.distributed as dist

    from speft_ds.comm import collectives

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=TOOL_S)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=limit)
    total = collectives.all_reduce(torch.full((8,), rank + 1.0, device=device))
    own = collectives.start_reduce_scatter(rank + torch.arange(16.0, device=device).view(2, 8))()
    if total.tolist() != [3.0] * 8 or own.tolist() != [2.0 * i + 1 for i in range(8 * rank, 8 * rank + 8)]:
        raise RuntimeError(f"wrong sums: {total}, {own}")
    dist.destroy_process_group()


# The machine


def check_hub() -> Iterator[Check]:
    """Whether models can be fetched, and whether there is a token, which is not told."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HOME

    error, what = None, "offline by choice"
    if not hub.is_offline_by_choice():
        error = hub.connection_error(hub.endpoint())
        what = f"{urlsplit(hub.endpoint()).hostname}: {error or 'reachable'}"
    fix = "HF_HUB_OFFLINE=1 and model.name_or_path=FOLDER; or, by a proxy or mirror, HTTPS_PROXY, HF_ENDPOINT"
    yield judge("hub", error is None, what, fix, "warning")
    yield check_folder("HF_HOME", Path(HF_HOME), "HF_HOME", 5)
    token = "there is one" if get_token() else "none (only gated models need one: hf auth login)"
    yield Check("hub token", "ok", token)


def check_machine() -> Iterator[Check]:
    """The cache folder, memory, cores, open files and SLURM."""
    yield check_folder("speft_ds cache", env.cache_folder(), "SPEFT_DS_CACHE", 1)
    _, group_cores = cgroup_limits(*CGROUPS)
    memory_gib = usable_memory() / GIB
    fix = f"end other work, or take smaller batches: the quickstart needs {QUICKSTART_GIB} GiB in float32"
    yield judge("memory", memory_gib >= QUICKSTART_GIB, f"{memory_gib:.1f} GiB available", fix, "warning")

    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    most = max(1, int(min(cores, group_cores)))
    what = f"{most} usable of {cores}" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    fix = f"export OMP_NUM_THREADS={max(1, most // 2)}, for 2 ranks: more threads than cores are much slower"
    yield judge("cores", (int(threads) if threads.isdigit() else cores) <= most, what, fix, "warning")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield judge("open files", not 0 <= files < 1024, f"ulimit -n: {files}", "ulimit -n 4096", "warning")
    has_slurm = shutil.which("sbatch") is not None
    yield Check("SLURM", "ok" if has_slurm else "skipped", "sbatch" if has_slurm else "no sbatch on the PATH")


def usable_memory() -> float:
    """Bytes of memory that are free, as far as this process' control group may have them."""
    return min(psutil.virtual_memory().available, cgroup_limits(*CGROUPS)[0])


def check_folder(name: str, folder: Path, variable: str, enough_gib: float) -> Check:
    """That a folder can be written, or made; leaves nothing behind. `variable` would move it elsewhere."""
    fix = f"free space or fix the permissions, or name another folder: export {variable}=FOLDER"
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(MIB))
    except OSError as error:
        return Check(name, "problem", f"{folder} cannot be written: {error.strerror}", fix)
    free_gib = shutil.disk_usage(existing).free / GIB
    return judge(name, free_gib >= enough_gib, f"{folder}, {free_gib:,.1f} GiB free", fix, "warning")


def cgroup_limits(root: Path, own: Path) -> tuple[float, float]:
    """(bytes of memory, cores) that control groups of version 2 leave us; infinity without a limit.

    Args:
        root, own: /sys/fs/cgroup and /proc/self/cgroup.
    """

    def read(file: Path) -> str:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""

    folder = root / read(own).rpartition("::/")[2]
    memory, cores = [math.inf], [math.inf]
    for group in (folder, *folder.parents):
        if (size := read(group / "memory.max")).isdigit():
            memory.append(int(size))
        microseconds, _, period = read(group / "cpu.max").partition(" ")
        if microseconds.isdigit():
            cores.append(int(microseconds) / int(period))
    return min(memory), min(cores)


# Group -> its checks, what to type if they crash or hang
GROUPS = {
    "packages": (check_packages, "report it with this text"),
    "compiler": (check_build_tools, "report it with this text"),
    "torch": (check_torch, f"{PIP} --force-reinstall torch, built for the driver that nvidia-smi shows"),
    "DeepSpeed": (check_deepspeed, f"DS_BUILD_OPS=0 {PIP} --force-reinstall --no-deps deepspeed"),
    "2 ranks": (check_collectives, "fix what is above; let the firewall pass 127.0.0.1"),
    "hub": (check_hub, f"{PIP} --force-reinstall huggingface_hub"),
    "machine": (check_machine, "look for network drives that do not answer"),
}

if __name__ == "__main__":
    for _check in GROUPS[sys.argv[1]][0]():
        print(json.dumps(asdict(_check)), flush=True)
