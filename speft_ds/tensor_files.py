"""Files of tensors, written whole or not at all, and read back before they count."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speft_ds.io import flush_to_disk, replacing


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
            if not same_bits(file.get_tensor(name), tensor.detach().cpu()):
                raise OSError(f"{path}: {name} read back differs from what was written")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two CPU tensors have one dtype, one shape and the same bytes (NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:  # of any strides, which a view as bytes may refuse
        return True
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
