"""One line of the report, and what all checks need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIB, GIB = 2**20, 2**30

Status = Literal["ok", "warning", "problem", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the report, and what would mend it."""

    name: str
    status: Status
    what: str
    fix: str | None = None


def text_of(file: Path) -> str:
    """What is in a file; nothing where there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() else ""
