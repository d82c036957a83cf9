"""What a result depends on besides the code: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from speft_ds import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "lm_eval", "tokenizers")
CPU_INFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Of Python, this package and those that do the work."""
    own = {"python": platform.python_version(), "speft_ds": __version__}
    return own | {name: version(name) for name in PACKAGES}


def machine() -> dict:
    """This rank's processors."""
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor()
