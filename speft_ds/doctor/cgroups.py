"""Control groups: what a container or a scheduler leaves this process of the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from speft_ds.doctor.check import text_of


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[float, float]:
    """(bytes of memory, cores) that control groups, of version 1 or 2, leave us; infinity without a limit."""
    memory, cores = [math.inf], [math.inf]
    for folder in _folders(root, own):
        memory += _numbers(folder, "memory.max", "memory.limit_in_bytes")
        quota = _numbers(folder, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if len(quota) == 2:
            cores.append(quota[0] / quota[1])
    return min(memory), min(cores)


def _folders(root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's groups and of those around them."""
    for line in text_of(own).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):  # version 2 has one line, without a controller
            mount = root / controller
            folder = mount / path.lstrip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(mount))


def _numbers(folder: Path, *files: str) -> list[float]:
    """The numbers in those of the files that are there: a folder has the files of one version."""
    words = [word for file in files for word in text_of(folder / file).split()]
    numbers = [math.inf if word == "max" else float(word) for word in words]
    return [math.inf if number < 0 or number > 2**60 else number for number in numbers]
