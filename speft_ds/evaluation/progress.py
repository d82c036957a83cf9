"""Progress of long work: a bar on rank 0's terminal, or a line every half minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from speft_ds.comm import collectives
from speft_ds.comm.collectives import log_rank0

EVERY_S = 30.0


class Progress:
    """Context in which `update(done)` shows how many of `total` are done."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        is_on_terminal = collectives.rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, leave=False) if is_on_terminal else None
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now - self.last > EVERY_S:
            self.last, rate = now, done / (now - self.start)
            seconds_left = (self.total - done) / rate
            progress = f"{done:,} of {self.total:,}, {rate:.1f}/s, about {seconds_left:.0f} s left"
            log_rank0(f"{self.what}: {progress}")
