"""Who this process is among the ranks, by what its launcher left in the environment. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess

PORTS = range(10_000, 30_000)  # a SLURM step takes one; below those that the system hands out


def init_env() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT where they are not set.

    `deepspeed` and `torchrun` set them; `srun` says the same in SLURM_* variables; a process that nobody
    launched is a group of one.
    """
    found = _of_srun() if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ else {}
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's name for it
        found["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    # A lone process may have others beside it, so its port is any; a group's is that of the launchers.
    is_lone = "WORLD_SIZE" not in os.environ and "WORLD_SIZE" not in found
    lone = rank_env(0, 1, free_port() if is_lone else 29500)
    for key, value in {**lone, **found}.items():
        os.environ.setdefault(key, value)


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment of a rank whose group is on this machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _of_srun() -> dict[str, str]:
    """What the variables of a job step say. A batch script without srun has none of a step."""
    env = os.environ
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_SIZE": str(tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]),
        "MASTER_PORT": str(PORTS[(int(env["SLURM_JOB_ID"]) * 8 + int(env["SLURM_STEP_ID"])) % len(PORTS)]),
    }
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = _first_node(env["SLURM_STEP_NODELIST"])
    return found


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of task counts, `2(x3),1`, as [2, 2, 2, 1]."""
    counts = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts


def _first_node(nodes: str) -> str:
    """The first name of a SLURM node list, `node[03-05],gpu1`; rank 0 runs there."""
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # in a container, say
        first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()  # up to a comma outside brackets
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
