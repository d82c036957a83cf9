"""Safetensors files written a tensor at a time: only the header has to be known ahead."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.format import FLOATS
from speft_ds.io import flush_to_disk

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in FLOATS.items()}

Headers = dict[str, tuple[str, tuple[int, ...]]]  # key -> dtype by safetensors' name, shape


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * torch.Size(shape).numel()


def write_tensors(path: Path, headers: Headers, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file whose tensors come in the order of `headers`, and flush it to disk.

    Raises:
        OSError: it cannot be written.
    """
    lines, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, (dtype, shape) in headers.items():
        end = offset + num_bytes(dtype, shape)
        lines[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(lines, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for (key, (dtype, shape)), (name, tensor) in zip(headers.items(), tensors, strict=True):
            assert name == key and tensor.numel() * tensor.element_size() == num_bytes(dtype, shape), key
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    flush_to_disk(path)


def aligned(headers: Headers) -> Headers:
    """In an order in which every tensor starts at a multiple of its items' size: the larger ones first."""
    return dict(sorted(headers.items(), key=lambda item: -ITEM_BYTES[item[1][0]]))


def split(files: dict[str, Headers], max_bytes: int) -> list[Headers]:
    """The same tensors in files of at most so many bytes, but for a tensor that is larger by itself."""
    shards: list[Headers] = [{}]
    size = 0
    for headers in files.values():
        for key, (dtype, shape) in headers.items():
            more = num_bytes(dtype, shape)
            if shards[-1] and size + more > max_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = (dtype, shape)
            size += more
    return shards
