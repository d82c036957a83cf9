"""The adapter on disk, read and written; byte for byte in docs/adapter_format.md.

adapter.safetensors    per weight: `<name>.gaps` uint8, its coded indices; `<name>.delta` fp32 or bf16;
                       of a weight that was trained whole: `<name>.value`, all of its values
adapter.json           format version, base fingerprint and dtype, shapes, mask facts, recipe
of low-rank matrices   PEFT's two files: see `low_rank`
tokenizer/             the tokenizer with its new tokens, where there are some

trained weight = pretrained weight, with (base + delta).to(dtype) at the indices
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_ds.adapter.gaps import decode_gaps, encode_gaps
from speft_ds.adapter.low_rank import PEFT_TENSORS, LowRankFacts, LowRankMatrices
from speft_ds.config.check_model import PEFT_CONFIG
from speft_ds.config.model_config import HEAD
from speft_ds.config.values import BASE_FORMATS, MAX_MULTIPLE
from speft_ds.errors import UserError, shell
from speft_ds.io import flush_to_disk, read_json, sha256_of, write_json, write_safetensors

FORMAT_VERSION = 2
TENSORS, FACTS, CARD, TOKENIZER = "adapter.safetensors", "adapter.json", "README.md", "tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
# Of each kind of tensor: the dtypes, by safetensors' names, and the most dimensions.
TENSOR_KINDS = {"gaps": (("U8",), 1), "delta": (("F32", "BF16"), 1), "value": (tuple(FLOATS), 3)}

Entries = tuple[Tensor, Tensor]  # of a weight: [n] int64 flat indices, strictly increasing; [n] fp32 deltas
NO_ENTRIES: Entries = (torch.empty(0, dtype=torch.int64), torch.empty(0))


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it is not printable")
    return text


def _indexable(shape: list[int]) -> list[int]:
    if math.prod(shape) >= 2**63:
        raise ValueError("its flat indices do not fit into int64")
    return shape


Text = Annotated[str, AfterValidator(_printable)]
Shape = Annotated[list[PositiveInt], Field(min_length=2, max_length=2), AfterValidator(_indexable)]


class AdapterFacts(BaseModel):
    """What readers rely on in adapter.json. Other keys are kept and ignored."""

    model_config = ConfigDict(strict=True)

    tensors_sha256: Text
    base: Text
    dtype: Literal["float32", "bfloat16", "float16"]
    fingerprint: Text
    shapes: dict[Text, Shape]
    num_entries: int
    fingerprint_bfloat16: Text | None = None
    task: Text | None = None
    mask: dict | None = None
    recipe: dict | None = None
    base_format: Literal[BASE_FORMATS] | None = None
    quantised: list[Text] | None = None
    start: Literal["zero", "exact"] | None = None
    classes: list[str] | None = None
    pad_token_id: int | None = None
    low_rank: LowRankFacts | None = None
    new_tokens: list[str] | None = None
    vocabulary: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _grows_by_its_tokens(self) -> AdapterFacts:
        before, after = self.vocabulary or (1, 1)
        if not before <= after < before + len(self.new_tokens or ()) + MAX_MULTIPLE:
            raise ValueError("the vocabulary does not grow by the new tokens")
        return self


class Adapter:
    """An adapter folder, opened: header and facts are read and checked, entries read a weight at a time.

    Attributes:
        facts: the contents of adapter.json.
        names: weights that have entries, in model order; `shape`: of these, (out, in) by name.
        whole: weights whose values are all stored; `num_entries` does not count them.
        low_rank: matrices beside weights; None: it has none.
    """

    def __init__(self, folder: Path, facts: dict, file: safe_open, low_rank: LowRankMatrices | None = None):
        self.folder, self.facts, self._file, self.low_rank = folder, facts, file, low_rank
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        self._header = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
        self.whole = sorted(key.removesuffix(".value") for key in self._header if key.endswith(".value"))
        self.names = [name for name in facts["shapes"] if f"{name}.delta" in self._header]
        self.shape = {name: tuple(facts["shapes"][name]) for name in self.names}
        self._check_header()
        self.num_entries = sum(map(self.count, self.names))
        if self.num_entries != facts["num_entries"]:
            raise _unreadable(folder, f"{self.num_entries} entries, {FACTS} says {facts['num_entries']}")

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read the header and the facts. Raises UserError: missing, damaged, or of another format version."""
        folder = Path(folder)
        facts = _read_facts(folder)
        path = folder / TENSORS
        try:
            if not path.is_file():  # a pipe would keep us waiting
                raise OSError(f"{path} is not a file")
            file, sha256 = safe_open(path, framework="pt"), sha256_of(path)
            low_rank = LowRankMatrices(folder, facts["low_rank"]) if facts.get("low_rank") else None
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        if sha256 != facts["tensors_sha256"]:
            raise _unreadable(folder, "its hash is not the recorded one")
        return cls(folder, facts, file, low_rank)

    @property
    def num_bytes(self) -> int:
        """Size of its tensors' files."""
        own = (self.folder / TENSORS).stat().st_size
        return own + (self.low_rank.num_bytes if self.low_rank else 0)

    @property
    def num_classes(self) -> int | None:
        """Of a classifier's adapter; None for a language model's."""
        return self.value_shape(HEAD)[0] if HEAD in self.whole else None

    @property
    def vocabulary(self) -> tuple[int, int] | None:
        """Rows of the vocabulary in the base, and with the adapter's new tokens; None: it has none."""
        return tuple(self.facts["vocabulary"]) if self.facts.get("vocabulary") else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer with new tokens; None: there are none. Raises UserError: missing."""
        if not self.vocabulary:
            return None
        folder = self.folder / TOKENIZER
        if not folder.is_dir() or folder.is_symlink():
            raise _unreadable(self.folder, f"it has new tokens, and no folder {TOKENIZER}")
        return folder

    @property
    def delta_dtype(self) -> torch.dtype:
        """The dtype that deltas are stored in: fp32, or bf16 in a compressed adapter."""
        dtypes = {self._header[f"{name}.delta"][0] for name in self.names}
        return torch.bfloat16 if dtypes == {"BF16"} else torch.float32

    def count(self, name: str) -> int:
        """Number of entries of a weight."""
        return self._header[f"{name}.delta"][1][0] if name in self.shape else 0

    def entries(self, name: str) -> Entries:
        """The entries of a weight, on the CPU; one that is unchanged has none. Raises UserError: damaged."""
        if name not in self.shape:
            return NO_ENTRIES
        delta = self._finite(f"{name}.delta").to(torch.float32)
        gaps = self._file.get_tensor(f"{name}.gaps")
        try:
            return decode_gaps(gaps, len(delta), math.prod(self.shape[name])), delta
        except ValueError as error:
            raise _unreadable(self.folder, f"{name}: {error}") from error

    def value(self, name: str) -> Tensor:
        """The values of a weight that was trained whole, in its shape and the dtype of the run."""
        return self._finite(f"{name}.value")

    def value_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[f"{name}.value"][1])

    def _check_header(self) -> None:
        """Refuse keys, dtypes and shapes that are not the format's, before any byte of a tensor is read."""
        expected = [f"{name}.{kind}" for name in self.names for kind in ("gaps", "delta")]
        expected += [f"{name}.value" for name in self.whole]
        if odd := sorted(set(expected) ^ self._header.keys()):
            raise _unreadable(self.folder, f"{odd[0]!r} is missing, or of no weight with a shape")
        for key, (dtype, shape) in self._header.items():
            dtypes, num_dimensions = TENSOR_KINDS[key.rpartition(".")[2]]
            is_right = dtype in dtypes and 1 <= len(shape) <= num_dimensions and 0 not in shape
            if not is_right or not key.isprintable():
                raise _unreadable(self.folder, f"{key!r} is {dtype} of shape {shape}")
        classes = self.facts.get("classes")
        if classes and self.num_classes != len(classes):
            raise _unreadable(self.folder, f"{HEAD!r} is not of {len(classes)} classes")

    def _finite(self, key: str) -> Tensor:
        tensor = self._file.get_tensor(key).clone()  # a copy, because the file may change
        if not torch.isfinite(tensor).all():
            raise _unreadable(self.folder, f"{key} is not finite")
        return tensor


def tensors_sha256(folder: Path | None) -> str | None:
    """The hash that an adapter folder has recorded; None where there is no folder or no hash.

    With low-rank matrices, theirs follows.
    """
    try:
        facts = read_json(folder / FACTS) if folder else {}
        own, low_rank = facts.get("tensors_sha256"), facts.get("low_rank")
        return f"{own}+{low_rank['sha256']}" if low_rank else own
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None


def open_adapter(path: str | Path, reads_low_rank: bool = False) -> Adapter:
    """The adapter in a folder, or in the folder of its run.

    Args:
        reads_low_rank: whether the caller knows what to do with low-rank matrices.
    Raises:
        UserError: there is none, it is damaged, or it has matrices that the caller would leave out.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / FACTS).is_file():
            adapter = Adapter.open(folder)
            if adapter.low_rank is not None and not reads_low_rank:
                fix = f"{shell('speft', 'merge', str(path), 'OUTPUT')}; or PEFT, which reads this folder"
                raise UserError("it has low-rank matrices, not entries alone", str(folder), fix)
            return adapter
    fix = "give an adapter's folder, or the folder of a run that has finished"
    raise UserError("there is no adapter", where=str(path), fix=fix)


def _unreadable(folder: Path, what: object) -> UserError:
    fix = f"copy it again from its source, both {TENSORS} and {FACTS}"
    return UserError(f"not a readable adapter: {what}", str(folder), fix)


def _read_facts(folder: Path) -> dict:
    """The contents of adapter.json, checked."""
    path = folder / FACTS
    try:
        facts = read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION or type(version) is not int:
        what = f"adapter format {version!r:.40}, this version reads {FORMAT_VERSION}"
        raise UserError(what, str(folder), "write the adapter again with this version of speft_ds")
    try:
        AdapterFacts.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise _unreadable(folder, f"{FACTS}: {key!r:.100}: {first['msg']}") from error
    return facts


def write_adapter(
    folder: Path,
    entries: Iterable[tuple[str, Tensor, Tensor]],
    facts: dict,
    whole: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    write_low_rank: Callable[[Path], dict] | None = None,
    save_tokenizer: Callable[[Path], object] | None = None,
) -> None:
    """Write an adapter atomically: a temporary folder, flushed, read back, renamed.

    Args:
        folder: replaced where it holds an adapter.
        entries: (weight name, [n] sorted flat indices, [n] deltas), taken one at a time; a weight without
            entries is left out.
        facts: with `base`, `dtype`, `fingerprint`, and the `shapes` of every weight that has entries.
        whole: weight name -> its values, all of which are stored.
        dtype: of the deltas, fp32 or bf16.
        write_low_rank: writes low-rank matrices into a folder and returns what the facts say of them.
        save_tokenizer: writes the tokenizer with new tokens into a folder; None: there are none.
    Raises:
        UserError: it could not be read again (a delta is not finite, indices do not fit), or the folder holds
            something else than an adapter.
        OSError: it cannot be written.
    """
    tensors = {f"{name}.value": value.detach().cpu().contiguous() for name, value in (whole or {}).items()}
    num_entries = 0
    for name, index, delta in entries:
        if index.numel():
            tensors |= _encode(name, index, delta.detach().to("cpu", dtype).contiguous(), folder)
            num_entries += index.numel()
    temporary = folder.with_name(folder.name + ".tmp")
    _remove_adapter(temporary)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / TENSORS, tensors)
        sha256 = sha256_of(temporary / TENSORS)
        own = {"format_version": FORMAT_VERSION, "tensors_sha256": sha256, "num_entries": num_entries}
        if write_low_rank is not None:
            own["low_rank"] = write_low_rank(temporary)
        write_json(temporary / FACTS, {**own, **facts, **own})
        if save_tokenizer is not None:
            save_tokenizer(temporary / TOKENIZER)
            for file in (temporary / TOKENIZER).iterdir():
                flush_to_disk(file)
        flush_to_disk(temporary)
        _read_back(temporary)
        _remove_adapter(folder)  # of a run that was killed when it was almost done
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_back(folder: Path) -> None:
    """Make every check of a later reader. Raises UserError."""
    written = Adapter.open(folder)
    for name in written.names:
        written.entries(name)
    for name in written.whole:
        written.value(name)


def _encode(name: str, index: Tensor, delta: Tensor, folder: Path) -> dict[str, Tensor]:
    """The stored tensors of a weight's entries."""
    try:
        if not torch.isfinite(delta).all():
            raise ValueError("a delta is not finite")
        return {f"{name}.gaps": encode_gaps(index), f"{name}.delta": delta}
    except ValueError as error:
        fix = "train with a lower learning rate, or compose with smaller weights"
        raise UserError(f"{name}: {error}", str(folder), fix) from error


def _remove_adapter(folder: Path) -> None:
    """Remove a folder if it is an adapter's."""
    if not folder.exists():
        return
    ours = (TENSORS, FACTS, CARD, PEFT_TENSORS, PEFT_CONFIG)
    names = {path.name for path in folder.iterdir()} - {TOKENIZER} if folder.is_dir() else {""}
    if not all(name.startswith(ours) for name in names):
        raise UserError("there is something else than an adapter", str(folder), "choose another folder")
    shutil.rmtree(folder)
