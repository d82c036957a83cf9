"""Mask: which entries of which weights are trained. Every rank holds the same one.

mask.safetensors    per weight with entries: `<name>.index` sorted global flat indices
                    metadata: `format_version`, `shape` (JSON), `sha256`, `facts` (JSON)
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.io import write_safetensors
from speft_ds.sparse.layout import index_dtype, locate

FORMAT_VERSION = "1"
INDEX_DTYPES = ("I32", "I64")  # by safetensors' names


@dataclass(frozen=True)
class Mask:
    """Entries of weights; both dicts name every target, also one without entries."""

    index: dict[str, Tensor]  # name -> [k] sorted global flat indices (int32, int64 from 2^31 elements on)
    shape: dict[str, tuple[int, int]]  # name -> (out_features, in_features)

    @cached_property
    def num_trainable(self) -> int:
        return sum(index.numel() for index in self.index.values())

    @cached_property
    def num_target_elements(self) -> int:
        """Elements of all targeted weights: what `density` is a fraction of."""
        return sum(self.numel(name) for name in self.shape)

    @property
    def density(self) -> float:
        return self.num_trainable / max(1, self.num_target_elements)

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and indices (as little-endian int64), the same on every rank and device."""
        digest = hashlib.sha256()
        for name in sorted(self.index):
            digest.update(f"{name} {self.shape[name][0]} {self.shape[name][1]}\n".encode())
            digest.update(self.index[name].to("cpu", torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def numel(self, name: str) -> int:
        rows, columns = self.shape[name]
        return rows * columns

    def with_rows(self, rows: Tensor, shape: dict[str, tuple[int, int]]) -> Mask:
        """This mask with the [n] sorted rows of these other weights, weight -> (rows, columns), behind it."""
        index, device = dict(self.index), collectives.device()
        for name, (_, columns) in shape.items():
            flat = (rows[:, None] * columns + torch.arange(columns)).flatten()
            index[name] = flat.to(device, index_dtype(math.prod(shape[name])))
        return Mask(index, {**self.shape, **shape})

    def columns(self) -> dict[str, Tensor]:
        """Weight -> sorted int64 columns that have entries."""
        return {name: used_columns(index, self.shape[name][1]) for name, index in self.index.items()}

    @cached_property
    def num_used_columns(self) -> dict[str, int]:
        """Weight -> number of its columns that have entries."""
        return {name: columns.numel() for name, columns in self.columns().items()}

    @property
    def compute(self) -> float:
        """Share of the dense weight gradient's multiply-adds that belongs to columns with entries."""
        spent = sum(self.shape[name][0] * count for name, count in self.num_used_columns.items())
        return spent / max(1, self.num_target_elements)

    def cost_in_words(self) -> str:
        """How many columns have entries, and what these cost."""
        used, width = sum(self.num_used_columns.values()), sum(columns for _, columns in self.shape.values())
        share = f"{used:,} of {width:,} ({used / width:.1%})"
        return (
            f"columns with entries: {share}, {self.compute:.1%} of the dense weight gradient's multiply-adds"
        )

    def facts(self) -> dict:
        """What a report says of the mask: counts, density (of the targeted weights), hash."""
        return {
            "compute": self.compute,
            "num_used_columns": sum(self.num_used_columns.values()),
            "num_columns": sum(columns for _, columns in self.shape.values()),
            "num_trainable": self.num_trainable,
            "num_target_elements": self.num_target_elements,
            "density": self.density,
            "sha256": self.sha256,
            "per_layer": {name: index.numel() for name, index in self.index.items()},
        }


def used_columns(index: Tensor, width: int) -> Tensor:
    """[k] flat indices into a weight of `width` columns -> the sorted int64 columns with any of them."""
    return torch.bincount(index.to(torch.int64) % width, minlength=width).nonzero()[:, 0]


def save_mask(path: Path, mask: Mask, facts: dict) -> None:
    """Write a mask file atomically; one rank calls this.

    Args:
        facts: what a reader should know, as JSON holds it; with `model_facts.base_facts` for `mask.load`.
    Raises:
        OSError: it cannot be written.
    """
    assert mask.index.keys() == mask.shape.keys(), "every target has an index, if an empty one"
    tensors = {
        f"{name}.index": index.cpu().contiguous() for name, index in mask.index.items() if index.numel()
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "shape": json.dumps(mask.shape),
        "sha256": mask.sha256,
        "facts": json.dumps(facts),
    }
    write_safetensors(path, tensors, metadata)


def read_mask(path: str | Path) -> tuple[Mask, dict]:
    """The mask in a file, and the facts it was saved with, checked. On the CPU.

    Raises:
        UserError: no readable mask of this format version; an index that does not fit its weight; a hash
            that is not the recorded one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shape, sha256, facts = _read_metadata(path, file.metadata() or {})
            index = _read_index(path, file, shape)
    except (OSError, SafetensorError) as error:
        _refuse(path, f"not a readable mask: {error}")
    mask = Mask(index=index, shape=shape)
    if mask.sha256 != sha256:
        _refuse(path, "the mask is damaged: its hash is not the recorded one")
    return mask, facts


def _refuse(path: str | Path, what: str) -> NoReturn:
    raise UserError(what, where=str(path), fix="write the mask with `speft score RECIPE`, or copy it again")


def _read_metadata(
    path: str | Path, metadata: dict[str, str]
) -> tuple[dict[str, tuple[int, int]], str, dict]:
    """The checked `shape`, `sha256` and `facts` of a mask file."""
    version = metadata.get("format_version")
    if version is None:
        _refuse(path, "not a mask: its metadata has no format_version")
    if version != FORMAT_VERSION:
        _refuse(path, f"mask format {version}, this version reads {FORMAT_VERSION}")
    documents = []
    for key in ("shape", "facts"):
        try:
            document = json.loads(metadata[key])
        except (KeyError, ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            _refuse(path, f"the mask is damaged: its metadata has no {key}, or not as a JSON object")
        documents.append(document)
    shape, facts = documents
    if not shape:
        _refuse(path, "the mask is damaged: it names no weight")
    for name, sizes in shape.items():
        if not name.isprintable() or not _is_shape(sizes):
            _refuse(path, f"the mask is damaged: {name!r} has no shape (out_features, in_features)")
    return {name: tuple(sizes) for name, sizes in shape.items()}, metadata.get("sha256", ""), facts


def _is_shape(sizes: object) -> bool:
    """Whether it is [out_features, in_features] with flat indices that int64 can hold."""
    if not isinstance(sizes, list) or len(sizes) != 2:
        return False
    return all(type(size) is int and size > 0 for size in sizes) and sizes[0] * sizes[1] < 2**63


def _read_index(path: str | Path, file: safe_open, shape: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The checked indices of every weight of a mask file, in the order of `shape`."""
    stored = set(file.keys())
    if unknown := sorted(stored - {f"{name}.index" for name in shape}):
        _refuse(path, f"the mask is damaged: {unknown[0]!r} is not the index of a weight in its shape")
    dtype = index_dtype(max(rows * columns for rows, columns in shape.values()))
    indices = {}
    for name, (rows, columns) in shape.items():
        if f"{name}.index" not in stored:
            indices[name] = torch.empty(0, dtype=dtype)
            continue
        header = file.get_slice(f"{name}.index")  # before any byte of a tensor that torch may not know
        if header.get_dtype() not in INDEX_DTYPES or len(header.get_shape()) != 1:
            _refuse(path, f"{name}: the index is {header.get_dtype()} of shape {header.get_shape()}")
        index = file.get_tensor(f"{name}.index")
        first, last = map(int, index.aminmax()) if index.numel() else (0, 0)
        if first < 0 or last >= rows * columns:
            _refuse(path, f"{name}: indices from {first} to {last}, the weight has {rows * columns} elements")
        if not (index[1:] > index[:-1]).all():
            _refuse(path, f"{name}: indices are not strictly increasing")
        indices[name] = index.to(dtype)
    return indices


def overlap(a: Mask, b: Mask) -> int:
    """Number of entries that both masks have."""
    num_common = 0
    for name in a.index.keys() & b.index.keys():
        wanted = a.index[name].to(torch.int64)
        _, found = locate(b.index[name].to(wanted.device, torch.int64), wanted)
        num_common += int(found.sum())
    return num_common


def jaccard(a: Mask, b: Mask) -> float:
    """|A and B| / |A or B| over all weights, as [0, 1]; 1 for two masks without entries."""
    num_common = overlap(a, b)
    num_either = a.num_trainable + b.num_trainable - num_common
    return num_common / num_either if num_either else 1.0
