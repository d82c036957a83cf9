"""Writing files so that a crash or a full disk leaves the old file or none, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
    temporary = path.with_name(path.name + ".tmp")
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


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write to a temporary name, flush to disk, read back and compare bit for bit, rename.

    Args:
        tensors: contiguous, on any device.
        metadata: kept in the file's header.
    Raises:
        OSError: it cannot be written, or reads back differently.
    """
    with replacing(path) as temporary:
        # safetensors makes a file that only its owner can read: give it the mode of any new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
            flush_to_disk(temporary)
            _compare(temporary, tensors, metadata)
        except SafetensorError as error:  # safetensors' own word for a full disk
            raise OSError(str(error)) from error


def _compare(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(tensors) or file.metadata() != metadata:
            raise OSError(f"{path}: the header read back differs from what was written")
        for name, tensor in tensors.items():
            if not _same_bits(file.get_tensor(name), tensor.detach().cpu()):
                raise OSError(f"{path}: {name} read back differs from what was written")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two CPU tensors have one dtype, one shape and the same bytes (NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
