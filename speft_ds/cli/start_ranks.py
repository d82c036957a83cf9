"""Starting a job under the deepspeed launcher: on how many ranks, where its results go. Imports no torch."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from speft_ds.cli.launch import checked_recipe
from speft_ds.config.load_recipe import ROOT, as_override, load_recipe
from speft_ds.config.recipe import Job
from speft_ds.env import free_port
from speft_ds.errors import UserError
from speft_ds.training.run_dir import check_output_dir

STOP_S = 35  # that a stopped launcher gives its ranks, and a little more


def default_ranks(num_gpus: int) -> int:
    """One rank per GPU, or two on a machine without GPUs."""
    return num_gpus or 2


def launch(job: Job, recipe: str, overrides: list[str], ranks: int | None, is_verbose: bool = False) -> int:
    """Check a recipe, run the job on its ranks (None: the default), and return the launcher's exit code.

    Args:
        is_verbose: whether DeepSpeed's launcher says what it does.
    Raises:
        UserError: the recipe or its files are wrong; nothing is started then.
    """
    gpus = visible_gpus()
    world_size = ranks or default_ranks(len(gpus))
    if gpus and world_size > len(gpus):
        fix = f"--ranks {len(gpus)}, or DS_ACCELERATOR=cpu"
        raise UserError(f"{world_size} ranks need as many GPUs, and there are {len(gpus)}", "--ranks", fix)
    check_output_dir(checked_recipe(job, recipe, overrides, world_size))
    # With GPUs and no --ranks, the launcher itself takes every GPU.
    num_gpus_flag = [] if gpus and ranks is None else ["--num_gpus", str(world_size)]
    if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:  # which it leaves out of account with --num_gpus
        num_gpus_flag = ["--include", f"localhost:{','.join(map(str, gpus[:world_size]))}"]
    script = [str(ROOT / "launch" / f"{job}.py"), "--recipe", recipe, *overrides]
    # The launcher's own port is always the same: a second run on the machine would find it taken.
    quiet = [] if is_verbose else ["--log_level", "warning"]
    command = [find_deepspeed(), *num_gpus_flag, "--master_port", str(free_port()), *quiet, *script]
    print(f"$ {shlex.join(command)}", flush=True)
    # DeepSpeed compiles a small op on its first start and looks for ninja on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    accelerator = {} if gpus else {"DS_ACCELERATOR": "cpu"}
    return run_to_end(command, {**os.environ, "PATH": path, **accelerator})


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

    None where there is no working nvidia-smi, or DS_ACCELERATOR says cpu.

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


def run_to_end(command: list[str], env: dict[str, str]) -> int:
    """Run a launcher; its exit code as a shell reports it. A signal to this process ends its ranks, too.

    The launcher is kept out of reach of the terminal's Ctrl-C: on SIGINT it dies with a traceback, before
    its ranks; on SIGTERM it ends them quietly.
    """
    process = subprocess.Popen(command, env=env, start_new_session=True)
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        _signal_group(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        code = process.wait()
        deadline = time.monotonic() + STOP_S
        while received and _signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.1)  # the ranks end after the launcher
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Signal every process of a group; whether there was one. Signal 0 only asks."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
