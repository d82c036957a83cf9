"""What this process may use: memory, cores, open files; and whether it can submit SLURM jobs."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

from speft_ds.doctor.cgroups import cgroup_limits
from speft_ds.doctor.check import GIB, MIB, Check, text_of

QUICKSTART_GIB = 10  # two CPU ranks of the quickstart, 4.8 GiB each


def check_memory_and_cores() -> list[Check]:
    """What this process may use, control groups included."""
    limit, quota = cgroup_limits()
    return [check_memory(limit), check_cores(quota)]


def check_memory(limit: float) -> Check:
    info = dict(re.findall(r"(\w+):\s*(\d+) kB", text_of(Path("/proc/meminfo"))))
    total, available = (int(info[key]) / MIB for key in ("MemTotal", "MemAvailable"))  # KiB to GiB
    what = f"{available:.1f} GiB available of {total:.1f} GiB"
    if limit / GIB < total:
        what += f", {limit / GIB:.1f} GiB by control group"
    if min(available, limit / GIB) >= QUICKSTART_GIB:
        return Check("memory", "ok", what)
    fix = f"end other work, or take smaller batches: the quickstart's 2 CPU ranks need {QUICKSTART_GIB} GiB"
    return Check("memory", "warning", what, fix)


def check_cores(quota: float) -> Check:
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    what = f"{cores}" + (f", {quota:g} by control group" if quota < cores else "")
    what += f", OMP_NUM_THREADS={threads}" if threads else ""
    most = max(1, int(min(cores, quota)))
    if (int(threads) if threads.isdigit() else cores) <= most:
        return Check("cores", "ok", what)
    fix = f"export OMP_NUM_THREADS={max(1, most // 2)}, for 2 ranks: more threads than cores are much slower"
    return Check("cores", "warning", what, fix)


def check_limits(with_gpus: bool) -> list[Check]:
    """Open files; with GPUs, locked memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = 0 <= files < 1024  # unlimited is negative
    what = f"ulimit -n: {'unlimited' if files < 0 else files}"
    checks = [Check("open files", "warning" if few else "ok", what, "ulimit -n 4096" if few else None)]
    if with_gpus:  # CUDA pins memory past this limit; InfiniBand's libraries do not
        short = locked >= 0 and Path("/dev/infiniband").exists()
        what = f"ulimit -l: {'unlimited' if locked < 0 else f'{locked // 1024} KiB'}"
        fix = "ulimit -l unlimited (in a container --ulimit memlock=-1), for NCCL over InfiniBand"
        checks.append(Check("locked memory", "warning" if short else "ok", what, fix if short else None))
    return checks


def check_slurm() -> list[Check]:
    """Whether this machine submits SLURM jobs; for information."""
    found = [tool for tool in ("sbatch", "srun") if shutil.which(tool)]
    if not found:
        return [Check("SLURM", "skipped", "no sbatch, no srun: only needed to submit SLURM jobs")]
    return [Check("SLURM", "ok", f"{' and '.join(found)} on the PATH")]
