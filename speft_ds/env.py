"""The ranks, the machine and the paths of this process, as its environment says. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from speft_ds import __version__
from speft_ds.errors import UserError, shell
from speft_ds.untrusted import printable, without_secrets

PORTS = range(10_000, 30_000)  # for a run to take one; below those that the system hands out
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "lm_eval", "tokenizers")
GIT_S = 5  # that git has to answer
CPU_INFO = Path("/proc/cpuinfo")
CACHE = "~/.cache/speft_ds"
KERNELS = "SPEFT_DS_KERNELS"  # how `train.sparse_backend: auto` chooses: `measured`, or by `rules` of thumb


# Ranks


def init_env() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT where they are not set.

    `deepspeed` and `torchrun` set them; `srun` says the same in SLURM_* variables; a process without a
    launcher is a group of one.
    """
    found = _of_srun() if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ else {}
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's name for it
        found["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    # Other single processes may run on this machine, so the port is any; a group's is that of the launchers.
    is_single = "WORLD_SIZE" not in os.environ and "WORLD_SIZE" not in found
    single = rank_env(0, 1, free_port() if is_single else 29500)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name; memory of a GPU does not fall to pieces
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's last calls, which a timeout writes down
    for key, value in {**single, **found}.items():
        os.environ.setdefault(key, value)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def log_rank0(text: str) -> None:
    """Print a line, on rank 0 alone."""
    if rank() == 0:
        print(printable(text), flush=True)


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables of one rank of a group that is on this machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of this machine that nobody listens on now, and that the system does not hand out meanwhile."""
    with socket.socket() as probe:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
    raise OSError(f"all ports from {PORTS[0]} to {PORTS[-1]} are taken")


def _of_srun() -> dict[str, str]:
    """What the variables of a job step say. A batch script without srun has none of a step."""
    env = os.environ
    tasks_per_node: list[str] = []  # of `2(x3),1`: 2, 2, 2, 1
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"]):
        tasks_per_node += [count] * int(repeat or 1)
    first_node = re.match(r"(?:[^,\[]|\[[^\]]*\])*", env["SLURM_STEP_NODELIST"]).group()
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_SIZE": tasks_per_node[int(env["SLURM_NODEID"])],
        "MASTER_ADDR": re.sub(r"\[(\w+)[^\]]*\]", r"\1", first_node),  # `node[03-05]`: rank 0 is on node03
        "MASTER_PORT": str(PORTS[(int(env["SLURM_JOB_ID"]) * 8 + int(env["SLURM_STEP_ID"])) % len(PORTS)]),
    }


def threads_per_rank(environment: Mapping[str, str], local_ranks: int) -> int:
    """Threads of a rank: those that its environment names, or its share of this machine's cores."""
    named = environment.get("OMP_NUM_THREADS", "")
    return (
        int(named) if named.isdigit() and int(named) else max(1, len(os.sched_getaffinity(0)) // local_ranks)
    )


# The machine


def versions() -> dict[str, str]:
    """Of Python, this package and those that do the work."""
    own = {"python": platform.python_version(), "speft_ds": __version__}
    return own | {name: version(name) for name in PACKAGES}


def machine_facts() -> dict:
    """This rank's processors. Imports torch."""
    import torch

    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }


def origin() -> dict:
    """Of what is started now: the date, the command line, the commits of the code."""
    now = datetime.now(UTC).isoformat(" ", "minutes").removesuffix("+00:00")
    return {"date": f"{now} UTC", "command": _command_line(), "commits": _commits()}


def _command_line() -> str:
    """As a shell takes it: without secrets and what a launcher adds."""
    script, *words = sys.argv
    words = [word for word in words if not word.startswith(("--local_rank", "--checked"))]
    return without_secrets(shell("/".join(Path(script).parts[-2:]), *words))


def _commits() -> dict[str, str]:
    """`git describe` of the working folder and of this package, as far as they are in repositories.

    `-dirty` says that files were changed since.
    """
    own = Path(__file__).parents[1]
    folders = {"working folder": Path.cwd()} | ({"speft_ds": own} if (own / ".git").exists() else {})
    found = {name: commit for name, folder in folders.items() if (commit := _commit(folder))}
    return {"speft_ds": found["speft_ds"]} if len(set(found.values())) < len(found) else found


def _commit(folder: Path) -> str | None:
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # it writes nothing to the repository
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=GIT_S, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor()


def kernels_are_measured() -> bool:
    """Whether the choice of kernels may be measured on this machine. Raises UserError."""
    value = os.environ.get(KERNELS) or "measured"
    if value not in ("measured", "rules"):
        raise UserError(
            f"{value!r} is not a way to choose kernels", KERNELS, f"export {KERNELS}=rules, or measured"
        )
    return value == "measured"


# Paths


def expand_path(path: str) -> str:
    """Expand `~`; `~/.cache` follows XDG_CACHE_HOME where that is set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and (path == "~/.cache" or path.startswith("~/.cache/")):
        return cache.rstrip("/") + path.removeprefix("~/.cache")
    return os.path.expanduser(path)


def cache_folder(kind: str = "") -> Path:
    """The folder for cached results of one kind (`rows`, `ifd`), or of all kinds."""
    return Path(os.environ.get("SPEFT_DS_CACHE") or expand_path(CACHE)) / kind
