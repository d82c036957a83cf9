"""`speft report RUN ...`: the report of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

from speft_ds.report.compare import without_duplicates, write_comparison
from speft_ds.report.page import write_report


def report(folders: list[Path], output: Path | None) -> None:
    """Write report.html and report.md, and say where.

    Args:
        output: the folder for them; None: the run's own, or runs/report-A-vs-B for several runs.
    Raises:
        UserError: a folder is no run folder, or the report cannot be written.
    """
    folders = without_duplicates(folders)
    several = len(folders) > 1
    for path in write_comparison(folders, output) if several else write_report(folders[0], output):
        print(path)
