"""Two real ranks on this machine that add: what every run needs of gloo or NCCL."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from typing import Literal

from speft_ds.doctor.check import Check
from speft_ds.doctor.gpus import uses_gpus
from speft_ds.doctor.processes import probe_command, why_failed
from speft_ds.env import free_port

RANKS_S = 180  # of two ranks with their import of torch


def check_collectives(facts: dict) -> list[Check]:
    """Two real ranks over gloo and, with two GPUs, over NCCL."""
    if "torch" not in facts:
        return [Check("2 ranks, gloo", "skipped", "torch does not import")]
    backends = ["gloo", "nccl"] if uses_gpus(facts) and len(facts["gpus"]) >= 2 else ["gloo"]
    return [check_collective(backend) for backend in backends]


def check_collective(backend: Literal["gloo", "nccl"] = "gloo", timeout_s: float = RANKS_S) -> Check:
    """all_reduce and reduce_scatter of two processes on this machine, over the loopback address."""
    name, start = f"2 ranks, {backend}", time.monotonic()
    port = free_port()
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2)]
        ranks = [_start_rank(backend, rank, port, log) for rank, log in enumerate(logs)]
        try:
            failure = _wait_for(ranks, logs, start + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait(timeout=5)
    if failure is None:
        return Check(name, "ok", f"all_reduce and reduce_scatter in {time.monotonic() - start:.1f} s")
    return Check(name, "problem", failure, _collective_fix(backend))


def _start_rank(backend: str, rank: int, port: int, log) -> subprocess.Popen:
    command = probe_command("collective", backend, str(rank), str(port))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def _wait_for(ranks: list[subprocess.Popen], logs: list, deadline: float) -> str | None:
    """None when all ranks are through, else the first failure; nobody waits for the peers of a dead rank."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                logs[rank].seek(0)
                return f"rank {rank} failed: {why_failed(code, logs[rank].read())}"
        if None not in codes:
            return None
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
    return f"timed out, waiting for rank {' and '.join(map(str, late))}"


def _collective_fix(backend: str) -> str:
    if backend == "nccl":
        return "look at it with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1; in a container: --shm-size=2g"
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return f"GLOO_SOCKET_IFNAME={interface}: name one that `ip -br addr` lists, or unset it"
    fix = "export GLOO_SOCKET_IFNAME=lo (several nodes: their network's interface in `ip -br addr`); "
    if address := os.environ.get("MASTER_ADDR"):
        fix += f"MASTER_ADDR={address} must be an address of the first node; "
    return fix + "let the firewall pass 127.0.0.1; see that `hostname -i` answers"
