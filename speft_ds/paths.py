"""Paths as users write them, and where things that were computed once are kept. Imports no torch."""

import os
from pathlib import Path

CACHE = "~/.cache/speft_ds"


def expand_path(path: str) -> str:
    """Expand `~`; `~/.cache` follows XDG_CACHE_HOME where that is set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and (path == "~/.cache" or path.startswith("~/.cache/")):
        return cache.rstrip("/") + path.removeprefix("~/.cache")
    return os.path.expanduser(path)


def cache_folder(kind: str = "") -> Path:
    """Where things of a kind (`rows`, `ifd`) that were computed once are kept; of any kind."""
    return Path(os.environ.get("SPEFT_DS_CACHE") or expand_path(CACHE)) / kind
