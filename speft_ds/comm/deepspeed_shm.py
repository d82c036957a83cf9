"""The op that DeepSpeed compiles at its first start for collectives on the CPU, and the lock of its build.

torch keeps other processes out of a build by a bare file. A process that is killed while it builds leaves
the file behind, and every later start on the machine waits for it, for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

from speft_ds.errors import UserError, shell
from speft_ds.io import open_lock

NAME = "deepspeed_shm_comm"
STALE_S = 300  # the op compiles in about 30 s


def extensions_folder() -> Path:
    """Where torch keeps what it compiles."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    default = Path(get_default_build_root()) / f"py{sys.version_info[0]}{sys.version_info[1]}_{build}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def lock_age_s(folder: Path) -> float | None:
    """Seconds since a build in `folder` took its lock; None: none is under way."""
    try:
        return time.time() - (folder / "lock").stat().st_mtime
    except FileNotFoundError:
        return None


def wait_for_build(folder: Path, stale_s: float = STALE_S) -> None:
    """Wait until nobody builds in `folder`; remove a lock older than `stale_s`, whose build was killed.

    Raises:
        UserError: such a lock cannot be removed.
    """
    has_warned = False
    while (age_s := lock_age_s(folder)) is not None:
        if age_s >= stale_s:
            _remove_stale_lock(folder, stale_s)
        elif age_s >= 60 and not has_warned:
            has_warned = True
            left = f"it is removed in {stale_s - age_s:.0f} s"
            print(f"waiting for a build of DeepSpeed's op; if {folder / 'lock'} was left behind, {left}")
        time.sleep(0.1)


def _remove_stale_lock(folder: Path, stale_s: float) -> None:
    try:
        # One rank at a time looks and removes: the lock that it finds may be that of a build begun just now.
        with open_lock(folder / "lock.check") as file, contextlib.suppress(FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX)
            age_s = lock_age_s(folder)
            if age_s is not None and age_s >= stale_s:
                (folder / "lock").unlink()
                note = f"note: removed {folder / 'lock'}, {age_s / 60:.0f} min old: its build was killed"
                print(note, flush=True)
    except OSError as error:
        what = f"a build of DeepSpeed's op that was killed left {folder / 'lock'}: {error.strerror}"
        fix = f"{shell('rm', '-r', folder)}, or export TORCH_EXTENSIONS_DIR=ANOTHER"
        raise UserError(what, str(folder), fix) from error
