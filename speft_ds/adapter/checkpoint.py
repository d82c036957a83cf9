"""A pretrained checkpoint on disk, read a weight at a time, under the names that its model class has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speft_ds import hub
from speft_ds.adapter.format import FLOATS
from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """A model folder.

    Attributes:
        name: as it was given; `folder`: where it is.
        config: the contents of config.json.
        model: the model class on the meta device: names and shapes, no values.
        weight: key in the files -> the name of the weight that it is loaded as; without keys of buffers and
            of parts that the class has not.
        problem: why its files cannot be read a weight at a time; None where they can.
    """

    def __init__(self, name: str, num_classes: int | None = None):
        """Read the headers.

        Args:
            name: a local folder, or a name on the hub that the cache has.
            num_classes: None for a causal language model; else it classifies.
        Raises:
            UserError: there is no such model, or it cannot be read.
        """
        self.name, self.num_classes, folder = name, num_classes, hub.model_folder(name)
        if folder is None:
            raise UserError(f"the model {name} is not at hand", fix=hub.model_hint(name, "--base"))
        self.folder = folder
        try:
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.model = _on_meta(folder, num_classes)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the model: {error}", where=str(folder)) from error
        if missing := hub.missing_weights(folder):
            raise UserError(f"the model lacks {', '.join(missing)}", where=str(folder))
        self.weight: dict[str, str] = {}
        self.problem = self._find_keys()

    @cached_property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by name; tied ones once."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    @cached_property
    def files(self) -> dict[str, safe_open]:
        """The files of weights, opened, by name; empty for another kind of checkpoint.

        Raises:
            UserError: one is damaged.
        """
        names = [SINGLE] if (self.folder / SINGLE).is_file() else []
        if not names and (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        try:
            return {name: safe_open(self.folder / name, framework="pt") for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the model: {error}", where=str(self.folder)) from error

    def header(self, file: str, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, by safetensors' name, and shape of a stored tensor."""
        tensor = self.files[file].get_slice(key)
        return tensor.get_dtype(), tuple(tensor.get_shape())

    def keys(self, file: str) -> list[str]:
        return list(self.files[file].keys())

    def read(self, file: str, key: str) -> Tensor:
        """A stored tensor, as it is stored."""
        return self.files[file].get_tensor(key)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every pretrained weight once, cast to `dtype`; where there is a `problem`, all are loaded first."""
        if self.problem:
            yield from ((name, parameter.detach()) for name, parameter in self.load(dtype).named_parameters())
            return
        seen = set()
        for file in self.files:
            for key in self.keys(file):
                name = self.weight.get(key)
                if name is not None and name not in seen:
                    seen.add(name)
                    yield name, self.read(file, key).to(dtype)

    def load(self, dtype: torch.dtype, folder: Path | None = None) -> nn.Module:
        """The whole model on the CPU, from here or from another folder.

        Raises:
            UserError: transformers cannot load it.
        """
        options = {} if self.num_classes is None else {"num_labels": self.num_classes}
        try:
            return _auto_class(self.num_classes).from_pretrained(
                folder or self.folder, dtype=dtype, ignore_mismatched_sizes=bool(options), **options
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the model: {error}", where=str(folder or self.folder)) from error

    def _find_keys(self) -> str | None:
        """Fill `weight`; returns the problem, if there is one."""
        if not self.files:
            return "its weights are not in safetensors files"
        place = {key: file for file in self.files for key in self.keys(file)}
        names: dict[int, list[str]] = {}  # of one weight, where it is tied
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for first, *others in names.values():
            keys = [key for name in (first, *others) for key in self._keys_for(name) if key in place]
            if not keys and first != HEAD:
                return f"its files have no {first}: its keys are converted as it loads"
            for key in keys:
                dtype, shape = self.header(place[key], key)
                if first != HEAD and (shape != self.shape[first] or dtype not in FLOATS):
                    return f"{key} is stored as {dtype} {shape}, the weight is {self.shape[first]}"
                self.weight[key] = first
        return None

    def _keys_for(self, name: str) -> list[str]:
        """What a weight may be called in the files: the decoder's checkpoints leave its prefix out."""
        prefix = f"{self.model.base_model_prefix}."
        return [name, name.removeprefix(prefix)] if name.startswith(prefix) else [name]


def _on_meta(folder: Path, num_classes: int | None) -> nn.Module:
    import transformers

    options = {} if num_classes is None else {"num_labels": num_classes}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is quantised")
    with torch.device("meta"):
        return _auto_class(num_classes).from_config(config)


def _auto_class(num_classes: int | None) -> type:
    import transformers

    if num_classes is None:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


class Fingerprint:
    """`speft_ds.model.fingerprint.fingerprint.fingerprint` of weights that come one at a time, in any order."""

    def __init__(self, shape: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.shape, self.dtype = {n: s for n, s in shape.items() if n != HEAD}, dtype
        self.hashes: dict[str, int] = {}

    def add(self, name: str, weight: Tensor) -> None:
        """Count a weight, in the dtype of the run; the first of tied ones."""
        from speft_ds.model.fingerprint import element_hash

        if name in self.shape and name not in self.hashes:
            self.hashes[name] = element_hash(weight, 0)

    def hexdigest(self) -> str:
        digest = hashlib.sha256()
        for name, shape in self.shape.items():
            digest.update(f"{name} {shape} {self.dtype} {self.hashes[name]:016x}\n".encode())
        return digest.hexdigest()
