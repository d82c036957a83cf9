"""Traces of some steps by torch's profiler, one file per rank: for Chrome's viewer, or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from speft_ds.comm import collectives
from speft_ds.env import log_rank0


class StepProfiler:
    """Profiles the steps of `train.profile`; call `before` and `after` around each.

    Args:
        window: [first, last] steps (from 1), both included; None: none.
        run: the run folder, in which `profile/rank{n}.json.gz` is written.
    """

    def __init__(self, window: list[int] | None, run: Path):
        self.first, self.last = window or (0, 0)
        self.folder = run / "profile"
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Before a step (from 1). A run that is resumed inside the window profiles the rest of it."""
        if self.profiler is None and self.first <= step <= self.last:
            on_gpu = collectives.device().type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self.profiler.start()

    def after(self, step: int) -> None:
        """After the same step: the last one writes the trace."""
        if self.profiler is None or step < self.last:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank{collectives.rank()}.json.gz"))
        log_rank0(f"note: the profile of steps {self.first} to {self.last} is in {self.folder}")
