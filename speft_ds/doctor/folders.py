"""Folders that must be writable and have space."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from speft_ds.doctor.check import GIB, MIB, Check
from speft_ds.doctor.gpus import uses_gpus
from speft_ds.env import cache_folder


def check_caches(facts: dict) -> list[Check]:
    """The folders that the package and what it compiles are kept in."""
    checks = [check_folder("speft_ds cache", cache_folder(), "SPEFT_DS_CACHE")]
    if "extensions" in facts:
        folder = Path(facts["extensions"])
        checks.append(check_folder("torch extensions", folder, "TORCH_EXTENSIONS_DIR", enough_gib=0.1))
    if uses_gpus(facts):
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path("~/.triton/cache").expanduser())
        checks.append(check_folder("Triton cache", folder, "TRITON_CACHE_DIR", enough_gib=0.1))
    return checks


def check_folder(name: str, folder: Path, variable: str, enough_gib: float = 1) -> Check:
    """That a folder can be written, or made; leaves nothing behind. `variable` would move it elsewhere."""
    fix = f"free space or fix the permissions, or name another folder: export {variable}=FOLDER"
    existing = folder
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(MIB))
    except OSError as error:
        return Check(name, "problem", f"{folder} cannot be written: {error.strerror} ({existing})", fix)
    free_gib = shutil.disk_usage(existing).free / GIB
    what = f"{folder}, {free_gib:,.1f} GiB free"
    return Check(name, "ok", what) if free_gib >= enough_gib else Check(name, "warning", what, fix)
