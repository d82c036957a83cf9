"""Starting a job under the deepspeed launcher: on which ranks, and how it ends. Imports no torch."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from speft_ds.cli.launch import EXIT_USER_ERROR, checked_start, finished_note, parse_arguments
from speft_ds.comm.signals import EXIT_CTRL_C, EXIT_STOPPED, SIGNALS
from speft_ds.config.load_recipe import ROOT, as_override, load_recipe
from speft_ds.config.recipe import Job
from speft_ds.env import free_port
from speft_ds.errors import UserError

POLL_S = 1.0  # between two looks at a run that may be stopped
STOP_S = 35  # that a stopped launcher gives its ranks, and a little more
RANKS_OF = "deepspeed.launcher.launch"  # the launcher's module whose children are the ranks
OWN_CODES = (0, 1, EXIT_USER_ERROR, EXIT_STOPPED, EXIT_CTRL_C)  # of ranks, which have said why
HOST = re.compile(r"([A-Za-z0-9][\w.:@-]*)\s+slots=(\d{1,4})\s*(?:#.*)?", re.ASCII)  # a line of a hostfile


@dataclass(frozen=True)
class Ranks:
    """Where the ranks of a job run.

    Attributes:
        flags: of the launcher; `environment`: its variables besides our own.
        about: `2 ranks, one per GPU`.
    """

    count: int
    flags: list[str]
    about: str
    environment: dict[str, str] = field(default_factory=dict)


def choose_ranks(asked: int | None, hostfile: Path | None = None, on_cpu: int = 1) -> Ranks:
    """The ranks of a job.

    Args:
        asked: how many; None: one per GPU, or `on_cpu` where there is none: one uses all cores.
        hostfile: the machines, as for `deepspeed --hostfile`; None: this one.
    Raises:
        UserError: there are fewer GPUs, or the hostfile cannot be read, or its machines not be reached.
    """
    if hostfile is not None:
        if asked is not None:
            fix = f"leave --ranks out, and change the slots in {hostfile}"
            raise UserError("with --hostfile, its slots say how many ranks there are", "--ranks", fix)
        slots = read_hostfile(hostfile)
        if missing := [tool for tool in ("ssh", "pdsh") if shutil.which(tool) is None]:
            what = f"the machines of a hostfile are reached by {' and '.join(missing)}, not installed here"
            raise UserError(what, "PATH", "apt-get install openssh-client pdsh; under SLURM: speft submit")
        about = f"{_count(sum(slots), 'rank')} on {_count(len(slots), 'machine')} of {hostfile}"
        return Ranks(sum(slots), ["--hostfile", str(hostfile)], about)
    gpus = visible_gpus()
    count = asked or len(gpus) or on_cpu
    if not gpus:
        more = "" if asked else "; --ranks N for another number"
        no_gpu = {"DS_ACCELERATOR": "cpu"}
        return Ranks(count, ["--num_gpus", str(count)], f"{_count(count, 'rank')} on the CPU{more}", no_gpu)
    if count > len(gpus):
        fix = f"--ranks {len(gpus)}, or DS_ACCELERATOR=cpu"
        raise UserError(f"{count} ranks need as many GPUs, and there are {len(gpus)}", "--ranks", fix)
    about = f"{_count(count, 'rank')}, one per GPU"
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # which the launcher leaves out of account with --num_gpus
        return Ranks(count, ["--include", f"localhost:{','.join(map(str, gpus[:count]))}"], about)
    # Without a number, the launcher itself takes every GPU.
    return Ranks(count, [] if asked is None else ["--num_gpus", str(count)], about)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def read_hostfile(path: Path) -> list[int]:
    """The slots of each machine of a hostfile, whose lines are like `node1 slots=8`. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the hostfile: {error}", "--hostfile", "name another") from error
    slots = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = HOST.fullmatch(line)
        if found is None or found[1] in slots or int(found[2]) < 1:
            what = f"not a machine and its slots, or one a second time: {line!r:.100}"
            raise UserError(what, f"{path}:{number}", "a line for each machine, like: node1 slots=8")
        slots[found[1]] = int(found[2])
    if not slots:
        raise UserError("the hostfile names no machine", str(path), "lines like: node1 slots=8")
    return list(slots.values())


def launch(
    job: Job,
    words: Sequence[str],
    ranks: Ranks,
    is_verbose: bool = False,
    should_stop: Callable[[], bool] | None = None,
    output: IO | None = None,
) -> int:
    """Check the command line of a launched script, run it on its ranks, and return the exit code of the job.

    Args:
        words: of `launch/<job>.py`.
        is_verbose: whether DeepSpeed's launcher says what it does.
        should_stop, output: see `run_to_end`.
    Raises:
        UserError: the recipe or its files are wrong; nothing is started then.
    """
    _, start = checked_start(job, parse_arguments(job, words=words), ranks.count)
    if start.state == "finished":
        print(finished_note(start))
        return 0
    script = [str(ROOT / "launch" / f"{job}.py"), *words]
    # The launcher's own port is always the same: a second run on the machine would find it taken.
    command = [find_deepspeed(), *ranks.flags, "--master_port", str(free_port())]
    print(f"{job} on {ranks.about}", flush=True)
    if is_verbose:
        print(f"$ {shlex.join([*command, *script])}", flush=True)
    else:
        command += ["--log_level", "critical"]  # a rank says itself why it ends
    # DeepSpeed compiles a small op on its first start and looks for ninja on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, **ranks.environment}
    if "--hostfile" not in ranks.flags:  # it is in the flags, and the launcher would say that it ignores it
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return run_to_end([*command, *script, "--checked"], environment, should_stop, output)


def fit_overrides(name: str, overrides: list[str], world_size: int) -> list[str]:
    """Overrides for what the user left open: a free run folder, a micro-batch that all ranks can share."""
    recipe = load_recipe(name, overrides)
    given = {text.partition("=")[0] for text in overrides}
    if "output_dir" not in given:
        folder, number = Path(recipe.output_dir), 1
        while folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            number += 1
            folder = Path(f"{recipe.output_dir}-{number}")
        overrides = [as_override("output_dir", str(folder)), *overrides]
        if number > 1:
            print(f"{recipe.output_dir} is not empty: this run goes to {folder}")
    micro = recipe.train.shared_micro_batch(world_size)
    if "train.micro_batch" not in given and micro != recipe.train.micro_batch:
        overrides = [*overrides, f"train.micro_batch={micro}"]
        print(f"for {world_size} ranks: train.micro_batch={micro}")
    return overrides


def visible_gpus() -> list[int]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves, as nvidia-smi numbers them, in its order.

    Empty where there is no working nvidia-smi, or DS_ACCELERATOR says cpu.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES names parts of GPUs (MIG), which the launcher cannot be told.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    found = re.findall(r"^GPU (\d+):.*?(?:UUID: ([\w-]+))?\)?$", listing.stdout, re.MULTILINE)
    uuid_of = {int(number): uuid for number, uuid in found} if listing.returncode == 0 else {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(uuid_of)
    chosen = []
    for name in map(str.strip, visible.split(",")):
        if name.startswith("MIG-"):
            fix = "CUDA_VISIBLE_DEVICES with the numbers of complete GPUs, as `nvidia-smi -L` lists them"
            raise UserError(f"{name} is a part of a GPU", "CUDA_VISIBLE_DEVICES", fix)
        by_uuid = [n for n, uuid in uuid_of.items() if name.startswith("GPU-") and uuid.startswith(name)]
        fits = by_uuid or [n for n in uuid_of if name == str(n)]
        if len(fits) != 1 or fits[0] in chosen:
            break  # as CUDA does, which sees nothing behind a name that is none
        chosen += fits
    return chosen


def count_gpus() -> int:
    """How many GPUs a run on this machine may use; see `visible_gpus`."""
    return len(visible_gpus())


def find_deepspeed() -> str:
    """The launcher of this Python's environment, activated or not. Raises UserError."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the deepspeed launcher is not installed", sys.prefix, "pip install deepspeed")
    return found


def run_to_end(
    command: list[str],
    env: dict[str, str],
    should_stop: Callable[[], bool] | None = None,
    output: IO | None = None,
) -> int:
    """Run a launcher; its exit code as a shell reports it. Asked to stop, it has its ranks stop.

    The launcher is kept out of reach of the terminal's Ctrl-C: on SIGINT it dies with a traceback, before
    its ranks. They alone are told: it waits for them, and has their exit code. A second signal ends all.

    Args:
        should_stop: asked every second; once it says so, the ranks are told to stop.
        output: an open file for what they print; None: the terminal.
    """
    errors = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=output, stderr=errors)
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            _signal_group(process.pid, signal.SIGKILL)
        elif not _stop_ranks(process.pid):
            _signal_group(process.pid, signal.SIGTERM)

    caught = (*SIGNALS, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        while (code := _wait(process, POLL_S if should_stop else None)) is None:
            if not received and should_stop():
                stop(signal.SIGTERM, None)
        deadline = time.monotonic() + STOP_S
        while received and _signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.1)  # the ranks end after the launcher
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code not in (0, EXIT_STOPPED):
        return 128 + received[0]
    if code in OWN_CODES:
        return code
    killed_by = -code if code < 0 else 256 - code  # a launcher exits with the negative number of the signal
    if killed_by not in set(signal.Signals) or code == 255:  # ssh's, of a machine that it cannot reach
        return code
    name = signal.Signals(killed_by).name
    hint = ": too little memory?" if killed_by == signal.SIGKILL else ""
    print(f"the job was ended by {name}{hint}", file=sys.stderr)
    return 128 + killed_by


def _wait(process: subprocess.Popen, timeout_s: float | None) -> int | None:
    """The exit code of a process; None where it takes longer."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _stop_ranks(launcher: int) -> bool:
    """Send SIGTERM to the ranks below a launcher; whether there are any on this machine yet."""
    found, parents, below = False, set(), []
    with suppress(psutil.Error):  # any of them may end just now
        started = psutil.Process(launcher)
        below = started.children(recursive=True)
    for process in [started, *below] if below else []:
        with suppress(psutil.Error):
            if RANKS_OF in process.cmdline():
                parents.add(process.pid)
    for process in below:
        with suppress(psutil.Error):
            if process.ppid() in parents:
                process.terminate()
                found = True
    return found


def _signal_group(group: int, number: int) -> bool:
    """Signal every process of a group; whether there was one. Signal 0 only asks."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
