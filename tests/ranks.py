"""Real ranks for tests: W processes in a group, started once a world size, running many checks.

Where there are GPUs, each rank has one, and the group is NCCL's; else all are on the CPU, in a gloo group.

A check is a module-level function; it runs on every rank with the same arguments, and its returned values
come back as a list by rank. A check that raises or outlives its time limit fails with every rank's
traceback, and the ranks are started anew for the next one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from forked import server
from limits import HANG_S

from speft_ds.env import free_port, rank_env


@dataclass(frozen=True)
class Accelerator:
    """What the ranks of tests compute on."""

    name: str  # by DeepSpeed: `cpu` or `cuda`
    num_devices: int = 0  # of which each rank has one; 0: any number of ranks share the machine

    @classmethod
    def find(cls) -> Accelerator:
        """GPUs, where there are any and DS_ACCELERATOR=cpu does not say otherwise."""
        import torch

        is_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        num_gpus = 0 if is_cpu else torch.cuda.device_count()
        return cls("cuda", num_gpus) if num_gpus else cls("cpu")

    @property
    def ds_config(self) -> str:
        """The file of ds_configs/ that is meant for it."""
        return "zero3_bf16" if self.num_devices else "zero3_cpu"

    def why_not(self, world_size: int) -> str | None:
        """Why there cannot be so many ranks; None: there can."""
        if not self.num_devices or world_size <= self.num_devices:
            return None
        return f"{world_size} ranks need as many GPUs, this machine has {self.num_devices}"

    def environment(self, rank: int, world_size: int, port: int) -> dict[str, str]:
        """The variables of a rank; its GPU is that of its LOCAL_RANK."""
        own = {"DS_ACCELERATOR": self.name, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return rank_env(rank, world_size, port) | own


CPU = Accelerator("cpu")


def serve(environment: dict[str, str], pipe, stack_path: str) -> None:
    """Body of one rank: join the group, then run checks until told to stop."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from speft_ds.comm import collectives

    collectives.init()
    stacks = open(stack_path, "w")  # noqa: SIM115 - open for the life of the process
    faulthandler.register(signal.SIGUSR1, file=stacks)
    while (job := pipe.recv()) is not None:
        check, arguments = job
        try:
            pipe.send((True, check(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


FAILED_S = 60  # for the other ranks to fail in, once one has; what they do then is short


class Ranks:
    """A started group of `world_size` ranks; call it with a check and its arguments.

    Args:
        accelerator: what they compute on.
        is_fresh: in processes of their own, for what a fork shares: memory, settings of the C library. On
            GPUs they always are: CUDA does not outlive a fork.
    """

    def __init__(self, world_size: int, accelerator: Accelerator = CPU, is_fresh: bool = False):
        self.world_size, self.accelerator = world_size, accelerator
        is_fresh = is_fresh or accelerator.num_devices > 0
        self.context = multiprocessing.get_context("spawn") if is_fresh else server()
        self.processes: list = []

    def start(self) -> None:
        port = free_port()
        self.stacks = [Path(tempfile.mkdtemp()) / f"rank{rank}" for rank in range(self.world_size)]
        pipes = [self.context.Pipe() for _ in range(self.world_size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            self.context.Process(
                target=serve,
                args=(
                    self.accelerator.environment(rank, self.world_size, port),
                    theirs,
                    str(self.stacks[rank]),
                ),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def __call__(self, check: Callable, **arguments) -> list:
        """Run `check(**arguments)` on every rank; its values by rank."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((check, arguments))
        answers = self._collect()
        if all(ok for ok, _ in answers):
            return [value for _, value in answers]
        self.stop()
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        raise AssertionError("\n".join(failed))

    def _collect(self) -> list[tuple]:
        """By rank: (True, value), or (False, text); a rank that hangs says where it stands."""
        answers: dict[int, tuple] = {}
        deadline = time.monotonic() + HANG_S
        while len(answers) < self.world_size and time.monotonic() < deadline:
            waiting = {self.pipes[rank]: rank for rank in range(self.world_size) if rank not in answers}
            for pipe in connection.wait(list(waiting), timeout=1):
                answers[waiting[pipe]] = self._receive(waiting[pipe])
            if any(not ok for ok, _ in answers.values()):
                # The others fail, too, or wait for this one in a collective: no use in waiting with them.
                deadline = min(deadline, time.monotonic() + FAILED_S)
        return [answers[rank] if rank in answers else self._hanging(rank) for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple:
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return False, "the process died"

    def _hanging(self, rank: int) -> tuple:
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return False, f"no answer; it stands at\n{self.stacks[rank].read_text()}"
