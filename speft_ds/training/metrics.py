"""What a user sees of a run: metrics.jsonl, one tidy line a step or a progress bar, seconds a stage."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from speft_ds.comm import collectives, watchdog
from speft_ds.training.monitor import Monitor


def say(text: str) -> None:
    """One tidy line, from rank 0."""
    if collectives.rank() == 0:
        print(text, flush=True)


class Timings(dict[str, float]):
    """Stage -> seconds, of all the times that it ran."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        watchdog.heartbeat(name)
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


class MetricsLog:
    """Writes one JSON line a step to `path` and shows it; silent and fileless where `path` is None.

    Args:
        path: metrics.jsonl of the run, on rank 0; None on the other ranks.
        num_steps: of the whole run.
        done: of these, that are in the file already.
        monitor: what else is told of every step.
    """

    def __init__(self, path: Path | None, num_steps: int, done: int = 0, monitor: Monitor | None = None):
        self.num_steps, self.monitor = num_steps, monitor
        self.file = path.open("a", encoding="utf-8") if path else None
        on_terminal = path and sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=done, unit="step") if on_terminal else None

    def log(self, values: dict) -> None:
        """Append one step's values (see `trainer.Trainer.train_step` for the keys)."""
        if self.file is None:
            return
        written = {key: None if _is_nonfinite(value) else value for key, value in values.items()}
        self.file.write(json.dumps(written) + "\n")
        self.file.flush()
        if self.monitor is not None:
            self.monitor.log(values["step"], values)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", tokens_s=f"{values['tokens_per_s']:.0f}")
            self.bar.update()
        else:
            print(self._line(values), flush=True)

    def flush(self) -> None:
        """Have all lines on the disk: a checkpoint counts on those of its steps."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def _line(self, values: dict) -> str:
        validation = f"held-out {values['validation_loss']:.4f}  " if "validation_loss" in values else ""
        skipped = f"skipped {values['num_skipped']}  " if values["num_skipped"] else ""
        return (
            f"step {values['step']:>5}/{self.num_steps}  loss {values['loss']:.4f}  {validation}{skipped}"
            f"grad_norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
            f"memory {values['peak_memory_gib']:.2f} GiB  {values['tokens_per_s']:.0f} tokens/s  "
            f"{values['step_ms']:.0f} ms"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.monitor is not None:
            self.monitor.close()
        if self.file is not None:
            self.file.close()


def _is_nonfinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def tokens_per_second(path: Path, num_warmup: int = 3) -> float:
    """Throughput of a run from its metrics file, without the first steps."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = lines[num_warmup:] or lines
    return sum(line["num_tokens"] for line in lines) / (sum(line["step_ms"] for line in lines) / 1000)


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
