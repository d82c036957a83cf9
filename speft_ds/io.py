"""Atomic writes of files and folders, JSON, locks, file hashes. Imports no torch unless it writes tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from speft_ds.errors import UserError, shell

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 2**25  # bytes of a file: what Python reads in two seconds, whatever is in it
MAX_DEPTH = 200  # objects and lists in each other


def read_bytes(path: Path, max_bytes: int = MAX_JSON) -> bytes:
    """The contents of a file that is to be small.

    Raises:
        OSError: there is none, it is no regular file (a pipe would keep us waiting), or it is too large.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
    return content


def read_json(path: Path, max_bytes: int = MAX_JSON) -> Any:
    """The document in a JSON file. Raises OSError as `read_bytes`, and ValueError as `parse_json`."""
    return parse_json(read_bytes(path, max_bytes))


def parse_json(text: str | bytes) -> Any:
    """A JSON document.

    Raises:
        ValueError: it is not one (in UTF-8), is nested too deeply, or a string in it is not Unicode: pictures
            and terminals fail on it.
    """
    document = decode_json(text)
    json.dumps(document, ensure_ascii=False).encode()
    return document


def decode_json(text: str | bytes, **options: Any) -> Any:
    """A JSON document by `json.loads` with these options; a string in it may have half of a character.

    Raises:
        ValueError: it is not one (in UTF-8), or nested more than MAX_DEPTH deep: what works on it would fail.
    """
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        document = json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        level = [document] if isinstance(document, dict | list) else []
        for _ in range(MAX_DEPTH):
            inside = (value.values() if isinstance(value, dict) else value for value in level)
            level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if level:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return document


def open_lock(path: Path, may_make: bool = True) -> IO[bytes]:
    """A file to be locked; what is in it stays, and a link is not followed.

    Args:
        may_make: make one where there is none, and open it for writing, which exclusive locks over NFS need.
    Raises:
        OSError: it is a link or no regular file, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT if may_make else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "r+b" if may_make else "rb")


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to: flushed and renamed to it, or removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name: two jobs may be writing the same file of a shared cache.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises OSError."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: dict) -> None:
    """Write a JSON file completely or not at all; what JSON lacks becomes text, as lm-eval does.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps(document, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value: object) -> object:
    from lm_eval.utils import handle_non_serializable  # late: few documents need it

    return handle_non_serializable(value)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file completely or not at all, after reading it back and comparing it bit for bit.

    Args:
        tensors: contiguous, on any device.
        metadata: kept in the file's header.
    Raises:
        OSError: it cannot be written, or reads back differently.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        # safetensors makes a file that only its owner can read: give it the mode of any new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
            with safe_open(temporary, framework="pt") as file:
                if set(file.keys()) != set(tensors) or file.metadata() != metadata:
                    raise OSError(f"{path}: the header read back differs from what was written")
                for name, tensor in tensors.items():
                    if not same_bits(file.get_tensor(name), tensor.detach().cpu()):
                        raise OSError(f"{path}: {name} read back differs from what was written")
        except SafetensorError as error:  # safetensors' own word for a full disk
            raise OSError(str(error)) from error


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one device have one dtype, one shape and the same bytes (NaN equals itself)."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:  # of any strides, which a view as bytes may refuse
        return True
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` to write to: renamed to it at the end, removed after an error.

    Args:
        output: does not exist, or is an empty folder.
    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.mkdir(parents=True)
    except FileExistsError as error:
        fix = f"another command is writing it, or was killed: {shell('rm', '-r', temporary)}"
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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder itself, or where the hub's cache keeps what links lead to."""
    real = path.resolve()
    return real.is_relative_to(folder.resolve()) or real.parent.name == "blobs"
