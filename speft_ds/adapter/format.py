"""The adapter on disk, read and written; byte for byte in docs/adapter_format.md.

adapter.safetensors    per weight: `<name>.gaps` uint8, its indices coded; `<name>.delta` fp32 or bf16;
                       of a classifier's head, which the base has not, `<name>.value` whole
adapter.json           format version, base fingerprint and dtype, shapes, mask facts, recipe

trained weight = pretrained weight, with (base + delta).to(dtype) at the indices
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_ds.adapter.gaps import decode_gaps, encode_gaps
from speft_ds.errors import UserError
from speft_ds.io import flush_to_disk, write_json, write_safetensors

FORMAT_VERSION = 2
TENSORS, FACTS, CARD = "adapter.safetensors", "adapter.json", "README.md"
MAX_FACTS_BYTES = 2**26
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
# Facts by key: what they are, and whether every adapter has them.
KINDS = {
    "tensors_sha256": (str, True),
    "base": (str, True),
    "dtype": (str, True),
    "fingerprint": (str, True),
    "shapes": (dict, True),
    "num_entries": (int, True),
    "fingerprint_bfloat16": (str, False),
    "task": (str, False),
    "mask": (dict, False),
    "recipe": (dict, False),
    "classes": (list, False),
    "pad_token_id": (int, False),
}


class Adapter:
    """An adapter folder, opened: header and facts are read and checked, entries read a weight at a time.

    Attributes:
        facts: the contents of adapter.json.
        names: weights that have entries, in model order; `heads`: weights that are kept whole.
        shape: weight name -> (out, in), of every weight that has entries.
        num_entries: of all weights; a head's values are not counted.
    """

    def __init__(self, folder: Path, facts: dict, file: safe_open):
        self.folder, self.facts, self._file = folder, facts, file
        self._stored = stored = list(file.keys())
        self.heads = sorted(key.removesuffix(".value") for key in stored if key.endswith(".value"))
        with_entries = {key.removesuffix(".delta") for key in stored if key.endswith(".delta")}
        self.names = [name for name in facts["shapes"] if name in with_entries]
        self.shape = {name: tuple(facts["shapes"][name]) for name in self.names}
        expected = {f"{name}.{part}" for name in self.names for part in ("gaps", "delta")}
        expected |= {f"{name}.value" for name in self.heads}
        if odd := sorted(expected ^ set(stored)):
            raise damaged(folder, f"{odd[0]!r} is missing, or of no weight with a shape")
        self._check_headers()
        self.num_entries = sum(map(self.count, self.names))
        if self.num_entries != facts["num_entries"]:
            raise damaged(folder, f"{self.num_entries} entries, {FACTS} says {facts['num_entries']}")

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read the header and the facts, and check the file's hash.

        Raises:
            UserError: a file is missing, damaged or of another format version.
        """
        folder = Path(folder)
        facts = _read_facts(folder)
        path = folder / TENSORS
        try:
            if not path.is_file():  # nor a pipe, which would keep us waiting
                raise OSError(f"{path} is not a file")
            file = safe_open(path, framework="pt")
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"not a readable adapter: {error}", where=str(folder)) from error
        if digest != facts["tensors_sha256"]:
            raise damaged(folder, "its hash is not the recorded one")
        return cls(folder, facts, file)

    def count(self, name: str) -> int:
        """Entries of a weight."""
        return self._header(f"{name}.delta")[1][0]

    def entries(self, name: str) -> tuple[Tensor, Tensor]:
        """The entries of a weight, on the CPU.

        Returns:
            [n] int64 flat indices into the whole weight, strictly increasing; [n] fp32 deltas, finite.
        Raises:
            UserError: they are damaged.
        """
        rows, columns = self.shape[name]
        delta = self._finite(f"{name}.delta").to(torch.float32)
        try:
            index = decode_gaps(self._file.get_tensor(f"{name}.gaps"), len(delta), rows * columns)
        except ValueError as error:
            raise damaged(self.folder, f"{name}: {error}") from error
        return index, delta

    def head(self, name: str) -> Tensor:
        """The whole weight [out, in] of a head, in the dtype of the run."""
        return self._finite(f"{name}.value")

    def head_shape(self, name: str) -> tuple[int, int]:
        return tuple(self._header(f"{name}.value")[1])

    @property
    def num_classes(self) -> int | None:
        """Of a classifier's adapter; None for a language model's."""
        return self.head_shape(self.heads[0])[0] if self.heads else None

    def delta_dtype(self) -> torch.dtype:
        """What deltas are stored in: fp32, or bf16 in a compressed adapter."""
        dtypes = {self._header(f"{name}.delta")[0] for name in self.names}
        return torch.bfloat16 if dtypes == {"BF16"} else torch.float32

    def _header(self, key: str) -> tuple[str, list[int]]:
        tensor = self._file.get_slice(key)
        return tensor.get_dtype(), tensor.get_shape()

    def _check_headers(self) -> None:
        """Refuse dtypes and shapes that are not the format's, before any byte of a tensor is read."""
        allowed = {"gaps": (("U8",), 1), "delta": (("F32", "BF16"), 1), "value": (FLOATS, 2)}
        for key in self._stored:
            dtype, shape = self._header(key)
            dtypes, num_dimensions = allowed[key.rpartition(".")[2]]
            if dtype not in dtypes or len(shape) != num_dimensions or 0 in shape:
                raise damaged(self.folder, f"{key!r} is {dtype} of shape {shape}")
        if classes := self.facts.get("classes"):
            for name in self.heads:
                if self.head_shape(name)[0] != len(classes):
                    raise damaged(self.folder, f"{name!r} is not of {len(classes)} classes")

    def _finite(self, key: str) -> Tensor:
        tensor = self._file.get_tensor(key).clone()  # apart from the file, which may change
        if not torch.isfinite(tensor).all():
            raise damaged(self.folder, f"{key} is not finite")
        return tensor


def tensors_sha256(folder: Path | None) -> str | None:
    """The hash that an adapter folder has recorded; None: there is no folder, or it does not say."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8")) if folder else {}
        return facts.get("tensors_sha256")
    except (OSError, ValueError, AttributeError):
        return None


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the adapter is damaged: {what}", where=str(folder / TENSORS))


def _read_facts(folder: Path) -> dict:
    """The contents of adapter.json, as far as every reader relies on them.

    Raises:
        UserError: missing, of another version, or a fact is of another kind than it should be.
    """
    path = folder / FACTS
    try:
        if not path.is_file() or path.stat().st_size > MAX_FACTS_BYTES:
            raise OSError(f"{path} is not a file, or larger than {MAX_FACTS_BYTES} bytes")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"not a readable adapter: {error}", where=str(folder)) from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION or type(version) is not int:
        what = f"adapter format {version!r:.40}, this version reads {FORMAT_VERSION}"
        raise UserError(what, where=str(folder))
    for key, (kind, is_needed) in KINDS.items():
        fact = facts.get(key)
        is_right = type(fact) is kind and (kind is not str or fact.isprintable())
        if not is_right and (is_needed or fact is not None):
            raise UserError(f"the adapter is damaged: no {kind.__name__} {key}", where=str(path))
    for name, sizes in facts["shapes"].items():
        if not name.isprintable() or not _is_shape(sizes):
            raise UserError(f"the adapter is damaged: {name!r} has no shape [out, in]", where=str(path))
    if facts["dtype"] not in DTYPES or not all(type(name) is str for name in facts.get("classes") or []):
        raise UserError(
            "the adapter is damaged: its dtype is unknown, or its classes have no names", str(path)
        )
    return facts


def _is_shape(sizes: object) -> bool:
    """Whether it is [out, in] with flat indices that int64 can hold."""
    if not isinstance(sizes, list) or len(sizes) != 2:
        return False
    return all(type(size) is int and size > 0 for size in sizes) and sizes[0] * sizes[1] < 2**63


def write_adapter(
    folder: Path,
    entries: Iterable[tuple[str, Tensor, Tensor]],
    facts: dict,
    heads: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter atomically: a temporary folder, flushed, read back, renamed.

    Args:
        folder: replaced where it holds an adapter.
        entries: (weight name, [n] sorted flat indices, [n] deltas), taken one at a time; a weight without
            entries is left out.
        facts: with `base`, `dtype`, `fingerprint`, and the `shapes` of every weight that has entries;
            `num_entries` is counted here.
        heads: weight name -> [out, in], kept whole.
        dtype: of the deltas, fp32 or bf16.
    Raises:
        UserError: it could not be read again: a delta is not finite, indices do not fit; or the folder holds
            something else than an adapter.
        OSError: it cannot be written.
    """
    tensors = {f"{name}.value": value.detach().cpu().contiguous() for name, value in (heads or {}).items()}
    num_entries = 0
    for name, index, delta in entries:
        if index.numel() == 0:
            continue
        try:
            tensors[f"{name}.gaps"] = encode_gaps(index)
        except ValueError as error:
            raise UserError(f"{name}: {error}", where=str(folder)) from error
        tensors[f"{name}.delta"] = delta.detach().to("cpu", dtype).contiguous()
        num_entries += index.numel()
    temporary = folder.with_name(folder.name + ".tmp")
    _remove(temporary)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / TENSORS, tensors)
        with (temporary / TENSORS).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        own = {"format_version": FORMAT_VERSION, "tensors_sha256": digest, "num_entries": num_entries}
        write_json(temporary / FACTS, {**own, **facts, **own})
        flush_to_disk(temporary)
        _read_all(temporary)
        _remove(folder)  # of a run that was killed when it was almost done
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_all(folder: Path) -> None:
    """Every check that a later reader makes."""
    adapter = Adapter.open(folder)
    for name in adapter.names:
        adapter.entries(name)
    for name in adapter.heads:
        adapter.head(name)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is an adapter's."""
    if not folder.exists():
        return
    ours = (TENSORS, FACTS, CARD)
    if not folder.is_dir() or any(not path.name.startswith(ours) for path in folder.iterdir()):
        raise UserError("there is something else than an adapter", str(folder), "choose another folder")
    shutil.rmtree(folder)
