"""Real ranks for tests: W processes in a gloo group, started once a world size, running many checks.

A check is a module-level function; it runs on every rank with the same arguments, and its returned values
come back as a list by rank. A check that raises or outlives its time limit fails with every rank's
traceback, and the ranks are started anew for the next one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(rank: int, world_size: int, port: int, pipe, stack_path: str) -> None:
    """Body of one rank: join the group, then run checks until told to stop."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch

    torch.set_num_threads(1)
    from speft_ds import distributed

    distributed.init()
    stacks = open(stack_path, "w")  # noqa: SIM115 - open for the life of the process
    while (job := pipe.recv()) is not None:
        check, arguments, limit = job
        faulthandler.dump_traceback_later(limit - 5, file=stacks)
        try:
            pipe.send((True, check(**arguments)))
        except BaseException as error:
            # Errors that tests look at travel as themselves, next to the text that people look at.
            pipe.send((False, (error, traceback.format_exc())))
        faulthandler.cancel_dump_traceback_later()


class RankFailure(AssertionError):
    """A check failed on some rank; `errors` has each rank's exception or None."""

    def __init__(self, text: str, errors: list[BaseException | None]):
        super().__init__(text)
        self.errors = errors


class Ranks:
    """A started group of `world_size` ranks; call it with a check and its arguments."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.processes: list = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.stacks = [Path(tempfile.mkdtemp()) / f"rank{rank}" for rank in range(self.world_size)]
        pipes = [context.Pipe() for _ in range(self.world_size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(
                target=serve, args=(rank, self.world_size, port, theirs, str(self.stacks[rank])), daemon=True
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

    def __call__(self, check: Callable, limit: float = 180, **arguments) -> list:
        """Run `check(**arguments)` on every rank; its values by rank."""
        if not self.processes:
            self.start()
            limit += 120  # importing, and compiling DeepSpeed's CPU collective once a machine
        for pipe in self.pipes:
            pipe.send((check, arguments, limit))
        answers = [self._answer(rank, limit) for rank in range(self.world_size)]
        if all(ok for ok, _ in answers):
            return [value for _, value in answers]
        self.stop()
        errors = [None if ok else value[0] for ok, value in answers]
        text = "\n".join(f"rank {r}:\n{value[1]}" for r, (ok, value) in enumerate(answers) if not ok)
        raise RankFailure(text, errors)

    def _answer(self, rank: int, limit: float) -> tuple:
        pipe, process = self.pipes[rank], self.processes[rank]
        try:
            if pipe.poll(limit if rank == 0 else 10):
                return pipe.recv()
            problem = f"no answer within {limit} s\n{self.stacks[rank].read_text()}"
        except EOFError:
            problem = "the process died"
        return False, (TimeoutError(problem), f"{problem} (exit code {process.exitcode})", sys.exc_info()[1])
