"""A folder that is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speft_ds.errors import UserError
from speft_ds.io import flush_to_disk


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` to write to: renamed to it at the end, removed after an error.

    Args:
        output: not there, or an empty folder.
    Raises:
        UserError: it cannot be written, or somebody else is writing it.
    """
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.mkdir(parents=True)
    except FileExistsError as error:
        fix = f"another command is writing it, or was killed: rm -r {temporary}"
        raise UserError(f"{temporary} is there already", where=str(output), fix=fix) from error
    except OSError as error:
        raise _cannot_write(output, error) from error
    try:
        yield temporary
        flush_to_disk(temporary)
        if output.exists():
            output.rmdir()  # which is empty
        temporary.rename(output)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_write(output: Path, error: OSError) -> UserError:
    fix = "free space, or choose another folder"
    return UserError(f"cannot write: {error}", where=str(output), fix=fix)
