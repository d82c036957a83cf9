"""Shared by the benchmarks: what machine this is, and markdown tables."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def facts() -> dict:
    """What a figure depends on besides the code."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "num_cores": os.cpu_count(),
        "num_threads_a_rank": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """As markdown, columns aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
