"""Files that are either whole or absent: atomic writes, and a completion marker with hashes."""

import json
import os
import tempfile
from pathlib import Path

from speft_ds.io import sha256_of

MARKER = "complete.json"
# hashing hundreds of MiB on every start would take seconds; above this, the size alone is compared
MAX_REHASHED_BYTES = 16 * 2**20


def write_text(path: Path, text: str) -> None:
    """Make `path` hold `text` (UTF-8) in one step; a file that already does is not touched."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared cache from its other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_marker(folder: Path, **facts: str) -> None:
    """Write the completion marker of `folder`: size and sha256 of each file, and `facts`. Call it last."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MARKER
    }
    write_text(folder / MARKER, json.dumps({**facts, "files": files}, indent=1) + "\n")


def is_complete(folder: Path, **facts: str) -> bool:
    """Whether `folder` has a marker with the same `facts`, and its files are still those that it names."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        return {**marker, **facts} == marker and all(
            _is_same(folder / name, entry) for name, entry in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut off, or not a marker at all
        return False


def _is_same(path: Path, entry: dict) -> bool:
    size = path.stat().st_size
    return size == entry["bytes"] and (size > MAX_REHASHED_BYTES or sha256_of(path) == entry["sha256"])
