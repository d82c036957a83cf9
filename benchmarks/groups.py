"""Processes of one method, one a rank, that wait for orders; so methods can take turns, a step at a time.

Every method has processes of its own: DeepSpeed patches torch for the whole process that it runs in, and
the memory of one method must not be counted with another's. Imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection

from speft_ds.env import free_port, rank_env

DIED = (False, ("the process died", "the process died, of too little memory perhaps"))
PRELOADED = ["peft", "speft_ds.training.schedule", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Case:
    """What all methods of a comparison have in common.

    Attributes:
        model: folder; dtype: of its weights, `float32` or `bfloat16`.
        rows, length: of the micro-batch; the same rows on every rank.
        density: fraction of the targets' weights that sparse methods train.
        lora_rank: of LoRA.
        compute: `mask.compute` of ours: the share of the columns that its entries lie in; None: any.
        stash: `train.stash` of ours.
        base_format: `model.base_format` of ours; None: the weights as they are.
        method: `method.name` of ours.
    """

    model: str
    dtype: str
    rows: int
    length: int
    density: float = 0.005
    lora_rank: int = 16
    compute: float | None = None
    stash: str | None = None
    base_format: str | None = None
    method: str = "sparse"


class Failure(Exception):
    """A method that raised, died or hung; its text is one line, `details` the traceback of a rank."""

    def __init__(self, text: str, details: str):
        super().__init__(text)
        self.details = details


def serve(method: str, case: Case, rank: int, world_size: int, port: int, pipe) -> None:
    """Body of one rank: make the method, then answer orders until told to stop."""
    os.environ.update(rank_env(rank, world_size, port))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed's log; the table is the parent's
    warnings.simplefilter("ignore")
    subject = None
    while (order := receive(pipe)) not in (None, DIED):
        try:
            subject = subject or make(method, case, world_size)
            pipe.send((True, getattr(subject, order)()))
        except BaseException as error:
            pipe.send((False, (one_line(error), traceback.format_exc())))


def make(method: str, case: Case, world_size: int):
    """The method, in this process."""
    import methods
    import torch

    torch.set_num_threads(1)
    return methods.make(method, case, world_size)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:300] + ' ...'}"


def settle() -> None:
    """Set what this process and all that it starts find in their environment; before torch is imported."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    # Freed memory is kept: giving it back costs page faults, a fifth of a step here and most of its spread.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000")
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def start_method():
    """How processes are started: with everything imported, where there is no CUDA, which forbids it."""
    context = multiprocessing.get_context("spawn" if has_gpu() else "forkserver")
    if not has_gpu():
        context.set_forkserver_preload(PRELOADED)
    return context


class Group:
    """The processes of one method; call it with an order, the name of one of the method's functions.

    Args:
        method: a name in `methods.METHODS`.
        limit_s: a rank that does not answer for so long hangs.
    """

    def __init__(self, method: str, case: Case, world_size: int, limit_s: float):
        context, self.limit_s = start_method(), limit_s
        port = free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(method, case, rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a rank that dies is heard of

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_) -> None:
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
            process.join()

    def __call__(self, order: str) -> list:
        """Every rank's answer, by rank. Raises Failure."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # of a rank that died, which `receive` says
                pipe.send(order)
        answers: dict[int, tuple] = {}
        deadline = time.monotonic() + self.limit_s
        while len(answers) < len(self.pipes) and (left := deadline - time.monotonic()) > 0:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            for pipe in connection.wait(list(waiting), timeout=left):
                answers[waiting[pipe]] = receive(pipe)
            if any(not good for good, _ in answers.values()):
                # The other ranks may wait for this one in a collective: no use in waiting with them.
                deadline = min(deadline, time.monotonic() + 5)
        if failed := {rank: value for rank, (good, value) in answers.items() if not good}:
            raise Failure(*failed[min(failed)])
        if len(answers) < len(self.pipes):
            raise Failure(f"{order}: no answer for {self.limit_s:.0f} s", "")
        return [answers[rank][1] for rank in range(len(self.pipes))]


def receive(pipe):
    """What the other end sends; DIED where there is none any more."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return DIED


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)
