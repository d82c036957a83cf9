"""What this process holds, and the most that it held, in bytes: allocated on the GPU, resident on a CPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

from speft_ds.comm import collectives
from speft_ds.comm.collectives import log_rank0

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


def held() -> int:
    """What is held now."""
    if collectives.device().type == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def restart() -> None:
    """From here on, `peak` forgets what was before; where that cannot be, a line says so."""
    if collectives.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError as error:
        log_rank0(f"note: the peak of memory is that of the whole run, selection included: {error}")


def peak() -> int:
    """The most that was held since `restart`, or since the process began where that cannot be restarted."""
    if collectives.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if "VmHWM" in line]
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_gib() -> float:
    """The same in GiB, as users are told it."""
    return peak() / 2**30
