"""Writing files so that a crash or a full disk leaves the old file or none. Imports no torch."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to: renamed to `path` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two jobs may be writing the same file of a shared cache.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: dict) -> None:
    """Write to a temporary name, flush to disk, rename; what JSON lacks becomes text, as lm-eval does.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=2, default=_plain, ensure_ascii=False)
            file.write("\n")
        flush_to_disk(temporary)


def _plain(value: object) -> object:
    from lm_eval.utils import handle_non_serializable  # late: few documents need it

    return handle_non_serializable(value)
