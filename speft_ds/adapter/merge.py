"""Adapter + base -> an ordinary Hugging Face checkpoint, a weight at a time, without a GPU."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.apply import another_base, check_weights, classifier_config, with_delta
from speft_ds.adapter.checkpoint import INDEX, SINGLE, Checkpoint, Fingerprint
from speft_ds.adapter.derive import check_output
from speft_ds.adapter.format import DTYPES, Adapter
from speft_ds.adapter.shards import NAME_OF, Headers, aligned, num_bytes, split, write_tensors
from speft_ds.errors import UserError
from speft_ds.io import flush_to_disk, new_folder, same_bits, write_json

# Not part of the merged checkpoint: other copies of the base's weights, and its card.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".md")
LARGEST_OTHER = 2**28  # bytes of a tokenizer, a configuration and so on
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class Merged:
    """What was written.

    Attributes:
        num_changed: entries; `num_bytes`: of the tensors.
        note: why the whole model had to be loaded; None where its weights came one at a time.
    """

    folder: Path
    num_changed: int
    num_bytes: int
    note: str | None = None


class Merge:
    """One merge: the base as the run saw it, with `alpha` times the deltas, in the dtype of the output.

    Args:
        alpha: 0 is the base, 1 the trained model.
        dtype: of the merged weights.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, alpha: float, dtype: torch.dtype):
        self.base, self.adapter, self.alpha, self.dtype = base, adapter, alpha, dtype
        self.run_dtype = DTYPES[adapter.facts["dtype"]]
        self.with_entries, self.heads = set(adapter.names), set(adapter.heads)

    def weight(self, name: str, pretrained: Tensor) -> Tensor:
        """The merged weight of one as it is stored; a head's is the adapter's."""
        if name in self.heads:
            return self.adapter.head(name).to(self.dtype)
        seen = pretrained.to(self.run_dtype)
        merged = seen.to(self.dtype, copy=True)
        if name in self.with_entries:
            index, delta = self.adapter.entries(name)
            merged.view(-1)[index] = with_delta(seen.view(-1)[index], delta, self.alpha, self.dtype)
        if not torch.isfinite(merged).all() and torch.isfinite(seen).all():
            raise UserError(f"values of {name} are too large for {self.dtype}", "--dtype", "take bfloat16")
        return merged

    def check(self, name: str, pretrained: Tensor, merged: Tensor) -> bool:
        """Whether a merged weight that was read back is what it should be."""
        if name in self.heads:
            return same_bits(merged, self.adapter.head(name).to(self.dtype))
        seen, merged = pretrained.to(self.run_dtype), merged.clone()
        if name in self.with_entries:
            index, delta = self.adapter.entries(name)
            before, flat = seen.view(-1)[index], merged.view(-1)
            if not same_bits(flat[index], with_delta(before, delta, self.alpha, self.dtype)):
                return False
            flat[index] = before.to(self.dtype)
        return same_bits(merged, seen.to(self.dtype))


def merge(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    alpha: float = 1.0,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
) -> Merged:
    """Write base + alpha * delta as a checkpoint that every loader of Hugging Face models reads.

    Between 0 and 1, `alpha` is the interpolation of Wortsman et al. 2022, "Robust fine-tuning of zero-shot
    models" (WiSE-FT). With 1, in the dtype of the run, the weights are those of `apply_adapter`, bit for bit.

    Args:
        base: local folder or hub name; None: the one that the adapter names.
        output: a folder that is not there, or is empty.
        alpha: the deltas' factor; a classifier's head is taken whole.
        dtype: `float32`, `bfloat16` or `float16`; None: the dtype of the run. It is what the base, as the
            run saw it in its own dtype, and the sums at the entries are cast to.
        max_shard_size: of a file, as `5GB` or in bytes; None: files as the base has them.
    Raises:
        UserError: another base, an output that is not empty, too little space, or nothing to merge with.
    """
    opened, output = Adapter.open(adapter), check_output(output)
    if dtype not in (None, *DTYPES) or not math.isfinite(alpha):
        raise UserError(f"dtype={dtype}, alpha={alpha}", fix=f"dtype: {', '.join(DTYPES)}; alpha: a number")
    max_bytes = parse_size(max_shard_size)
    checkpoint = Checkpoint(str(base or opened.facts["base"]), opened.num_classes)
    check_weights(opened, checkpoint.shape)
    job = Merge(checkpoint, opened, alpha, DTYPES[dtype or opened.facts["dtype"]])
    with new_folder(output) as temporary:
        num_bytes = _write(job, temporary, max_bytes)
        _copy_others(checkpoint.folder, temporary)
    return Merged(output, opened.num_entries, num_bytes, checkpoint.problem)


def parse_size(text: str | int | None) -> int | None:
    """`5GB` -> 5,000,000,000; a number is taken as it is."""
    if text is None or isinstance(text, int):
        return text
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)):
        raise UserError(f"{text!r} is no size", "--max-shard-size", "for example 5GB or 500MB")
    return int(float(found[1]) * UNITS.get((found[2] or "").upper(), 1))


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit on the disk."""
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"the merged model takes {needed / 2**30:.2f} GiB, there are {free / 2**30:.2f} free"
        raise UserError(what, str(folder), "free space, or choose a folder on another disk")


def _write(job: Merge, folder: Path, max_bytes: int | None) -> int:
    """Weights and configuration; returns the bytes of the weights."""
    if job.base.problem:
        from speft_ds.adapter.merge_loaded import write_loaded

        return write_loaded(job, folder, max_bytes)
    files = _plan(job, max_bytes)
    total = sum(num_bytes(*header) for headers in files.values() for header in headers.values())
    check_space(folder, total)
    place = {key: file for file in job.base.files for key in job.base.keys(file)}
    seen = Fingerprint(job.base.shape, job.run_dtype)
    for file, headers in files.items():
        write_tensors(folder / file, headers, _merged(job, headers, place, seen))
    if seen.hexdigest() != job.adapter.facts["fingerprint"]:
        raise another_base(job.adapter)
    _verify(job, folder, files, place)
    if list(files) != [SINGLE]:
        weight_map = {key: file for file, headers in files.items() for key in headers}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", _config(job))
    return total


def _plan(job: Merge, max_bytes: int | None) -> dict[str, Headers]:
    """File -> headers of the tensors it is to have."""
    base, known = job.base, set(job.base.model.state_dict())
    files: dict[str, Headers] = {}
    for file in base.files:
        headers = {key: base.header(file, key) for key in base.keys(file)}
        if job.heads:  # what only the language model has, as its head, is no part of a classifier
            headers = {key: header for key, header in headers.items() if key in base.weight or key in known}
        for key in headers.keys() & base.weight.keys():
            headers[key] = (NAME_OF[job.dtype], base.shape[base.weight[key]])
        files[file] = headers
    last = files[list(files)[-1]]
    for name in job.adapter.heads:
        if name not in base.weight:
            last[name] = (NAME_OF[job.dtype], job.adapter.head_shape(name))
    if max_bytes is not None:
        shards = split(files, max_bytes)
        number = f"-{{:05}}-of-{len(shards):05}" if len(shards) > 1 else ""
        files = {f"model{number.format(n)}.safetensors": shard for n, shard in enumerate(shards, 1)}
    return {file: aligned(headers) for file, headers in files.items() if headers}


def _merged(
    job: Merge, headers: Headers, place: dict[str, str], seen: Fingerprint
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file; the base's are counted into `seen` on the way."""
    for key in headers:
        name = job.base.weight.get(key, key)
        pretrained = job.base.read(place[key], key) if key in place else torch.empty(0)
        if key in job.base.weight:
            seen.add(name, pretrained.to(job.run_dtype))
        yield key, job.weight(name, pretrained) if name in job.base.shape else pretrained


def _verify(job: Merge, folder: Path, files: dict[str, Headers], place: dict[str, str]) -> None:
    """Read everything back and compare it with base and adapter."""
    from safetensors import safe_open

    for file, headers in files.items():
        with safe_open(folder / file, framework="pt") as written:
            for key in headers:
                name, merged = job.base.weight.get(key, key), written.get_tensor(key)
                pretrained = job.base.read(place[key], key) if key in place else torch.empty(0)
                compare = job.check if name in job.base.shape else _is_copy
                if not compare(name, pretrained, merged):
                    raise OSError(f"{file}: {key} read back differs from what was written")


def _is_copy(name: str, stored: Tensor, copied: Tensor) -> bool:
    return same_bits(stored, copied)


def _config(job: Merge) -> dict:
    """The base's config.json, for the merged weights."""
    config = _with_dtype(job.base.config, str(job.dtype).removeprefix("torch."))
    if not any(key in config for key in ("dtype", "torch_dtype")):
        config["dtype"] = str(job.dtype).removeprefix("torch.")
    if job.heads:
        entries = classifier_config(job.adapter.facts)
        config["architectures"] = [type(job.base.model).__name__]
        config.pop("num_labels", None)  # which id2label says
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["pad_token_id"] = entries.pop("pad_token_id")
        config.update(entries)
    return config


def _with_dtype(config: dict, dtype: str) -> dict:
    """A configuration, and those within it, with this dtype wherever it names one."""
    changed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value
    return changed


def _copy_others(base: Path, folder: Path) -> None:
    """Tokenizer, generation settings, code and other small files that are not written yet."""
    for path in sorted(base.iterdir()):
        wanted = path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_OUT)
        if wanted and path.stat().st_size <= LARGEST_OTHER and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            flush_to_disk(folder / path.name)
