"""Adapter + base -> an ordinary Hugging Face checkpoint, a weight at a time, without a GPU.

A base whose files cannot be read a weight at a time is loaded and merged in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import ByteSize, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from speft_ds.adapter.apply import (
    check_weights,
    classifier_config,
    pretrained_values,
    set_config,
    with_delta,
    with_entries,
)
from speft_ds.adapter.card import card_text
from speft_ds.adapter.format import CARD, DTYPES, FACTS, FLOATS, Adapter, open_adapter
from speft_ds.adapter.pretrained import INDEX, SINGLE, Fingerprint, Header, PretrainedCheckpoint
from speft_ds.adapter.save import check_output
from speft_ds.config.check_model import PEFT_CONFIG
from speft_ds.config.model_config import HEAD
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.io import flush_to_disk, lies_in, new_folder, same_bits, write_json, write_text
from speft_ds.model.codecs import codec
from speft_ds.model.new_tokens import resize_vocabulary, vocabulary_weights, with_rows

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Not part of the merged checkpoint: other copies of the base's weights, and its card, which is not its own.
LEFT_OUT = (*WEIGHTS, ".index.json", ".md")
# What a folder has that is an adapter, a run, or a checkpoint of a training.
OF_ITS_OWN = (FACTS, PEFT_CONFIG, "recipe.yaml", "trainer_state.json")
LARGEST_OTHER = 2**28  # bytes of a tokenizer, a configuration and so on

Headers = dict[str, Header]  # by key, of the tensors of a file


@dataclass
class Merged:
    """What was written: entries that changed, bytes of all tensors.

    `note` says why the complete model had to be loaded; it is None where its weights came one at a time.
    """

    num_changed: int
    num_bytes: int
    note: str | None


class Merge:
    """One merge: the base as the run saw it, with `alpha` times the deltas, in the dtype of the output.

    Attributes:
        quantised: weights that the run had in few bits; none where the deltas go onto the original base.
        shape: of every merged weight, by name.
    """

    def __init__(
        self, base: PretrainedCheckpoint, adapter: Adapter, alpha: float, dtype: torch.dtype, onto: str
    ):
        self.base, self.adapter, self.alpha, self.dtype = base, adapter, alpha, dtype
        self.quantised = frozenset(() if onto == "original" else adapter.facts.get("quantised") or ())
        self.run_dtype = DTYPES[adapter.facts["dtype"]]
        self.fingerprint = Fingerprint(base.shape, self.run_dtype)  # of the base, as far as it was merged
        self.shape = dict(base.shape)
        if adapter.vocabulary:
            of_tokens = vocabulary_weights(base.model)
            self.shape |= {name: (adapter.vocabulary[1], *base.shape[name][1:]) for name in of_tokens}

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors by their keys in the files, one in memory at a time."""
        for key in keys:
            name = self.base.weight.get(key, key)
            if name in self.base.shape:
                yield key, self.weight(name, None if name == HEAD else self.base.read(key))
            else:
                yield key, self.base.read(key)  # a buffer

    def weight(self, name: str, pretrained: Tensor | None) -> Tensor:
        """A merged weight; a classifier's head is the adapter's."""
        if name == HEAD:
            return self.adapter.value(name).to(self.dtype)
        seen = pretrained.to(self.run_dtype)
        self.fingerprint.add(name, seen)
        if name in self.adapter.whole:
            value = self.adapter.value(name)
            if self.alpha != 1.0:
                value = with_delta(seen, value.float() - seen.float(), self.alpha)
            return value.to(self.dtype)
        index, delta = self.adapter.entries(name)
        low_rank = self.adapter.low_rank
        if low_rank is not None and name in low_rank.shape:
            trained = low_rank.merged(name, with_entries(seen, index, delta))
            if self.alpha != 1.0:
                trained = with_delta(seen, trained - seen.float(), self.alpha, torch.float32)
            return self._checked(name, trained.to(self.dtype), seen)
        if name in self.quantised:
            seen = self._decoded(seen)
        elif self.adapter.facts.get("start") == "exact" and name in self.adapter.facts["quantised"]:
            # Of these deltas a part is what the entries had lost, and the original has lost nothing.
            delta = self._decoded(seen).view(-1)[index].float() + delta - seen.view(-1)[index].float()
        merged = seen.to(self.dtype, copy=True)
        if merged.shape != self.shape[name]:
            merged = with_rows(merged, self.shape[name][0])
        # New rows are taken as they are: there is nothing pretrained to interpolate with.
        delta = torch.where(index < seen.numel(), self.alpha * delta, delta)
        merged.view(-1)[index] = with_delta(pretrained_values(seen, index), delta, dtype=self.dtype)
        return self._checked(name, merged, seen)

    def _checked(self, name: str, merged: Tensor, seen: Tensor) -> Tensor:
        if not torch.isfinite(merged).all() and torch.isfinite(seen).all():
            raise UserError(f"values of {name} are too large for {self.dtype}", "--dtype", "--dtype bfloat16")
        return merged

    def _decoded(self, weight: Tensor) -> Tensor:
        """A weight as the run had it in few bits."""
        return codec(self.adapter.facts["base_format"]).round_trip(weight)


def merge(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    alpha: float = 1.0,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    scores: Sequence[dict] = (),
    onto: Literal["trained", "original"] = "trained",
) -> Merged:
    """Write base + alpha * delta as a checkpoint that every loader of Hugging Face models reads.

    Between 0 and 1, `alpha` is the interpolation of Wortsman et al. 2022, "Robust fine-tuning of zero-shot
    models" (WiSE-FT). With 1, in the dtype of the run, the weights are those of `apply_adapter`, bit for bit.

    Args:
        base: local folder or hub name; None: the one that the adapter names.
        adapter: its folder, or the folder of its run.
        output: a folder that is not there, or is empty.
        alpha: the factor of all differences; a classifier's head is taken as it is.
        dtype: `float32`, `bfloat16` or `float16`; None: the dtype of the run. It is what the base, as the
            run saw it in its own dtype, and the sums at the entries are cast to.
        max_shard_size: of a file, as `5GB` or in bytes; None: files as the base has them.
        scores: of the run, by `evaluation.scores.card_scores`: for the card, where they are those of the
            merged weights.
        onto: of a base in few bits: `trained`, the weights as the run decoded them; `original`, those
            of the checkpoint, which are nearer to the pretrained model and not those that were trained.
    Raises:
        UserError: another base, an output that is not empty, too little space, or nothing to merge with.
    """
    opened, output = open_adapter(adapter, reads_low_rank=True), check_output(output)
    if dtype not in (None, *DTYPES):
        raise UserError(f"there is no dtype {dtype}", "--dtype", f"choose from: {', '.join(DTYPES)}")
    if not math.isfinite(alpha):
        raise UserError(f"--alpha is {alpha}", "--alpha", "a number, like --alpha 0.5")
    if onto == "original" and not opened.facts.get("quantised"):
        raise UserError("the adapter's base was not in few bits", "--onto original", "leave --onto out")
    max_bytes = parse_size(max_shard_size)
    checkpoint = PretrainedCheckpoint(str(base or opened.facts["base"]), opened.num_classes)
    job = Merge(checkpoint, opened, alpha, DTYPES[dtype or opened.facts["dtype"]], onto)
    check_weights(opened, job.shape)
    with new_folder(output) as temporary:
        write = _merge_in_memory if checkpoint.problem else _merge_by_weight
        num_bytes = write(job, temporary, max_bytes)
        if opened.tokenizer:
            _copy_others(opened.tokenizer, temporary)  # in place of the base's
        _copy_others(checkpoint.folder, temporary)
        how = f"base + {alpha:g} x the adapter's differences, in {job.dtype}".replace("torch.", "")
        if base_format := opened.facts.get("base_format"):
            how += f", onto the base in {base_format}" if job.quantised else ", onto the original base"
        is_of_run = alpha == 1.0 and job.dtype == job.run_dtype and not (base_format and not job.quantised)
        card = card_text(opened.facts, scores if is_of_run else [], num_bytes, merged=how)
        write_text(temporary / CARD, card)
    matrices = opened.low_rank.shape if opened.low_rank else {}
    num_changed = sum(opened.count(name) for name in opened.names if name not in matrices)
    num_changed += sum(map(math.prod, matrices.values()))
    return Merged(num_changed, num_bytes, checkpoint.problem)


def parse_size(size: str | int | None) -> int | None:
    """`5GB` -> 5,000,000,000 bytes; a number without a unit is one of bytes. Raises UserError."""
    try:
        return None if size is None else int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as error:
        raise UserError(f"{size!r} is no size", "--max-shard-size", "for example 5GB or 500MB") from error


def _merge_by_weight(job: Merge, folder: Path, max_bytes: int | None) -> int:
    """Write weights and configuration; returns the bytes of the weights."""
    files = _plan_files(job, max_bytes)
    total = sum(_num_bytes(header) for headers in files.values() for header in headers.values())
    _check_space(folder, total)
    for file, headers in files.items():
        write_tensors(folder / file, headers, job.tensors(headers))
    job.fingerprint.check(job.adapter)
    for file, headers in files.items():
        with safe_open(folder / file, framework="pt") as written:
            for key, expected in job.tensors(headers):
                if not same_bits(written.get_tensor(key), expected):
                    raise OSError(f"{file}: {key} read back differs from what was written")
    if list(files) != [SINGLE]:
        weight_map = {key: file for file, headers in files.items() for key in headers}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", _config(job))
    return total


@torch.no_grad()
def _merge_in_memory(job: Merge, folder: Path, max_bytes: int | None) -> int:
    """Load the base on the CPU, merge, and have transformers write it; returns the bytes of the weights."""
    model = job.base.load(job.run_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = job.weight(name, parameter.data)
    job.fingerprint.check(job.adapter)
    set_config(model, classifier_config(job.adapter.facts))
    if job.adapter.vocabulary:
        resize_vocabulary(model, job.adapter.vocabulary[1])
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    _check_space(folder, total)
    model.save_pretrained(folder, **({} if max_bytes is None else {"max_shard_size": max_bytes}))
    written = job.base.load(job.dtype, folder).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in written or not same_bits(tensor, written[name]):
            raise OSError(f"{name} read back differs from what was written")
    return total


def _plan_files(job: Merge, max_bytes: int | None) -> dict[str, Headers]:
    """File -> headers of the tensors it is to have."""
    base, known = job.base, job.base.model.state_dict().keys()
    dtype = next(name for name, torch_dtype in FLOATS.items() if torch_dtype == job.dtype)
    files: dict[str, Headers] = {}
    for key, file in base.file_of.items():
        if key in base.weight:
            files.setdefault(file, {})[key] = dtype, job.shape[base.weight[key]]
        # What only the language model has, as its head, is no part of a classifier.
        elif key in known or HEAD not in job.adapter.whole:
            files.setdefault(file, {})[key] = base.header(key)
    if HEAD in job.adapter.whole and HEAD not in base.weight:
        next(reversed(files.values()))[HEAD] = dtype, job.adapter.value_shape(HEAD)
    if max_bytes is not None:
        headers = {key: header for headers in files.values() for key, header in headers.items()}
        pattern = "model{suffix}.safetensors"
        split = split_state_dict_into_shards_factory(
            headers, get_storage_size=_num_bytes, filename_pattern=pattern, max_shard_size=max_bytes
        )
        files = {file: {k: headers[k] for k in keys} for file, keys in split.filename_to_tensors.items()}
    # Larger items first, so that every tensor starts at a multiple of its items' size.
    return {
        file: dict(sorted(headers.items(), key=lambda item: -_item_bits(item[1][0])))
        for file, headers in files.items()
    }


def write_tensors(path: Path, headers: Headers, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file whose tensors come one at a time, in the order of `headers`; flush it to disk.

    Raises:
        OSError: it cannot be written.
    """
    lines, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, (dtype, shape) in headers.items():
        end = offset + _num_bytes((dtype, shape))
        lines[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(lines, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned
    path.parent.mkdir(parents=True, exist_ok=True)  # a shard of a base may be in a subfolder
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for key, tensor in tensors:
            assert tensor.nbytes == _num_bytes(headers[key]), key
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    flush_to_disk(path)


def _item_bits(dtype: str) -> int:
    """Bits of an item, which safetensors' names have in them: BF16, F8_E4M3, I64."""
    return 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])


def _num_bytes(header: Header) -> int:
    dtype, shape = header
    return math.prod(shape) * _item_bits(dtype) // 8


def _check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit on the disk."""
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"the merged model takes {needed / 2**30:.2f} GiB, there are {free / 2**30:.2f} free"
        raise UserError(what, str(folder), "free space, or choose a folder on another disk")


def _config(job: Merge) -> dict:
    """The base's config.json, for the merged weights: their dtype, and a classifier's classes."""
    name = str(job.dtype).removeprefix("torch.")

    def with_dtype(part: dict) -> dict:
        named = [key for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
        return part | dict.fromkeys(named, name)

    config = json.loads(json.dumps(job.base.config), object_hook=with_dtype)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["dtype"] = name
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    if job.adapter.vocabulary:
        text["vocab_size"] = job.adapter.vocabulary[1]
    if HEAD in job.adapter.whole:
        entries = classifier_config(job.adapter.facts)
        config["architectures"] = [type(job.base.model).__name__]
        config.pop("num_labels", None)  # which id2label says
        text["pad_token_id"] = entries.pop("pad_token_id")
        config.update(entries)
    return config


def _copy_others(base: Path, folder: Path) -> None:
    """Copy what is not written yet, of subfolders too: tokenizer, processor, templates, settings, code.

    Not of other models that lie in the base's folder, as the checkpoints of its training, nor of `folder`.
    """
    for place, subfolders, names in os.walk(base):
        inside = Path(place)
        subfolders[:] = [name for name in sorted(subfolders) if not _is_apart(inside / name, folder)]
        for path in (inside / name for name in sorted(names)):
            target = folder / path.relative_to(base)
            wanted = path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_OUT)
            if not wanted or path.stat().st_size > LARGEST_OTHER or target.exists():
                continue
            if not lies_in(path, base):
                log_rank0(f"note: {path} is not copied: it is a link to {path.resolve()}")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            flush_to_disk(target)


def _is_apart(subfolder: Path, output: Path) -> bool:
    """Whether a folder inside a base's is not of the base: hidden, being written, a model or a run itself."""
    names = os.listdir(subfolder) if os.access(subfolder, os.R_OK | os.X_OK) else []
    is_another = any(name in OF_ITS_OWN or name.endswith(WEIGHTS) for name in names)
    return subfolder.name.startswith(".") or is_another or subfolder.absolute() == output.absolute()
