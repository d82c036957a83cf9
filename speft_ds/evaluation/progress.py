"""Progress of long work: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from speft_ds.comm import collectives


class Progress:
    """Progress of long work that is counted: a bar on rank 0's terminal, else a line every half minute.

    Args:
        what: is done, like "scoring"; total: how many.
    """

    EVERY_S = 30.0

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.is_ours = collectives.rank() == 0
        on_terminal = self.is_ours and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, leave=False) if on_terminal else None
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int) -> None:
        """`done` of them are done by now."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif self.is_ours and now - self.last > self.EVERY_S:
            self.last, rate = now, done / (now - self.start)
            left = (self.total - done) / rate
            print(
                f"{self.what}: {done:,} of {self.total:,}, {rate:.1f}/s, about {left:.0f} s left", flush=True
            )
