"""Stop requests, by a signal or the end of the launcher, and the flags that all ranks agree on at every step.

The ranks look at `stop_reason()` together, at the end of a step, write a checkpoint together and leave with
EXIT_STOPPED. Nothing else happens in a signal handler, so that a save is never cut in half.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

from speft_ds import env
from speft_ds.config.values import split_interval

EXIT_STOPPED = 85  # asked to stop; what was reached is saved, and --resume goes on
EXIT_CTRL_C = 130  # a second Ctrl-C: left at once
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHERS = {"speft", "deepspeed", "torchrun", "deepspeed.launcher.launch", "torch.distributed.run"}
POLL_S = 1.0  # between two looks at the launcher

_reasons: list[str] = []


class Stopped(Exception):
    """All ranks agreed to stop here; `str()` says why."""


def request_stop(reason: str) -> None:
    """Have this rank ask the others to stop. The first reason counts."""
    if not _reasons and env.rank() == 0:
        print(
            f"{reason}: stopping after this step, with a checkpoint if all ranks can",
            file=sys.stderr,
            flush=True,
        )
    _reasons.append(reason)


def stop_reason() -> str | None:
    """Why this rank was asked to stop; None: it was not."""
    return _reasons[0] if _reasons else None


def watch_signals() -> None:
    """Turn signals, and the end of the launcher, into requests to stop; to be called in the main thread.

    A thread reads the signals' numbers from a pipe that the interpreter's own handler writes to: the main
    thread may be inside a collective for long, and would not run a Python handler before it is out. A second
    SIGINT leaves at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_listen, args=(reader, launchers()), name="stop", daemon=True).start()


def _forget() -> None:
    """In a forked helper of this process: signals do what they do anywhere."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _listen(reader: int, chain: list[int]) -> None:
    num_interrupts, gone = 0, False
    while True:
        ready, _, _ = select.select([reader], [], [], POLL_S)
        for number in os.read(reader, 64) if ready else b"":
            num_interrupts += number == signal.SIGINT
            if num_interrupts > 1:
                os._exit(EXIT_CTRL_C)
            if number in SIGNALS:
                request_stop(f"received {signal.Signals(number).name}")
        if not gone and launchers()[: len(chain)] != chain:
            # `deepspeed` dies of SIGUSR1, and of SIGTERM, without a word to its ranks.
            gone = True
            request_stop("the launcher has ended")


def launchers() -> list[int]:
    """Process ids of the launchers above this process, nearest first: `deepspeed`, its helper, `speft`."""
    found = []
    with contextlib.suppress(psutil.Error):  # one ends just now
        for process in psutil.Process().parents():
            python, *words = process.cmdline() or [""]
            if not re.fullmatch(r"python[\d.]*", os.path.basename(python)):
                break
            if not LAUNCHERS & {os.path.basename(word) for word in words[:4]}:
                break
            found.append(process.pid)
    return found


class StepFlags:
    """What one rank knows at every step; all ranks know it once it is summed, in the same call as the loss.

    Args:
        is_written: whether this rank's part of the checkpoint in flight is on the disk.
        every: `train.checkpoint_every`.
    Attributes (as of the last `reduce`):
        stop: a rank was asked to stop.
        all_written: all parts of the checkpoint in flight are on the disk.
    """

    KINDS = ("stop", "due", "written")

    def __init__(self, is_written: Callable[[], bool], every: int | str | None):
        self.is_written = is_written
        self.steps, self.seconds = split_interval(every)
        self.stop = self.due = self.all_written = False
        self.restart()

    def restart(self) -> None:
        """A checkpoint was begun: count the time from here."""
        self.since = time.monotonic()

    def local(self) -> list[float]:
        """This rank's flags, in the order of KINDS; rank 0's clock counts."""
        past = self.seconds is not None and time.monotonic() - self.since >= self.seconds
        is_due = past and env.rank() == 0
        return [float(stop_reason() is not None), float(is_due), float(self.is_written())]

    def reduce(self, sums: list[float]) -> None:
        """Take the flags summed over ranks, in the order of KINDS."""
        stopping, due, written = sums
        self.stop, self.due = stopping > 0, due > 0
        self.all_written = written == env.world_size()

    def is_time(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        return self.due or (self.steps is not None and done % self.steps == 0)
