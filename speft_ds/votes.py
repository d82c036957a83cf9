"""What the ranks agree on at every step: to stop, to save, that all have saved.

Each rank puts in what it knows; the numbers are summed over the ranks in the same call as the loss.
"""

from __future__ import annotations

import time

from torch import Tensor

from speft_ds.comm import collectives, signals
from speft_ds.config.section import split_interval
from speft_ds.training.checkpoint.writer import Writer


class Votes:
    """One rank's side of it.

    Args:
        writer: whose saves are asked about.
        every: `train.checkpoint_every`.
    Attributes (of the last count):
        stop: a rank was asked to stop.
        all_written: all parts of the save in flight are on the disk.
    """

    KINDS = ("stop", "due", "written")

    def __init__(self, writer: Writer, every: int | str | None):
        self.writer = writer
        self.steps, self.seconds = split_interval(every)
        self.stop = self.due = self.all_written = False
        self.restart()

    def restart(self) -> None:
        """A checkpoint was begun: count the time from here."""
        self.since = time.monotonic()

    def own(self) -> list[float]:
        """What this rank knows, in the order of KINDS; rank 0's clock counts."""
        past = self.seconds is not None and time.monotonic() - self.since >= self.seconds
        is_due = past and collectives.rank() == 0
        return [float(signals.stop_reason() is not None), float(is_due), float(self.writer.is_written)]

    def count(self, sums: Tensor) -> None:
        """Take what all ranks said; [len(KINDS)]."""
        stopping, due, written = sums.tolist()
        self.stop, self.due = stopping > 0, due > 0
        self.all_written = written == collectives.world_size()

    def is_time(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        return self.due or (self.steps is not None and done % self.steps == 0)
