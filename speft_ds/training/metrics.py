"""Metrics of a run: metrics.jsonl, one console line per step or a progress bar, seconds per stage."""

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

from speft_ds.comm import watchdog
from speft_ds.training.monitor import Monitor


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
    """Writes one JSON line per step to `path` and shows it; silent and fileless where `path` is None.

    Args:
        path: metrics.jsonl of the run, on rank 0; None on the other ranks.
        num_steps: of the run, earlier starts included.
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
        validation = f"validation {values['validation_loss']:.4f}  " if "validation_loss" in values else ""
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
