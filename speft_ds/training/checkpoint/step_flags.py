"""Whether a checkpoint is due, written, or asked for: agreed by all ranks at every step."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from speft_ds import env
from speft_ds.comm.signals import stop_reason
from speft_ds.config.values import split_interval


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

    def reduce(self, sums: Tensor) -> None:
        """Take the flags summed over ranks, [len(KINDS)]."""
        stopping, due, written = sums.tolist()
        self.stop, self.due = stopping > 0, due > 0
        self.all_written = written == env.world_size()

    def is_time(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        return self.due or (self.steps is not None and done % self.steps == 0)
