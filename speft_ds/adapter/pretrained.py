"""A pretrained checkpoint on disk, read a weight at a time under the names of its model class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
Header = tuple[str, tuple[int, ...]]  # of a stored tensor: dtype, by safetensors' name, and shape


class PretrainedCheckpoint:
    """A model folder.

    Attributes:
        name: as it was given; `folder`: where it is.
        config: the contents of config.json.
        model: the model class on the meta device: names and shapes, no values.
        file_of: key in the files -> name of its file; empty where the weights are not in safetensors files.
        weight: key in the files -> the name of the weight that it is loaded as; without keys of buffers and
            of parts that the class lacks.
        problem: why its files cannot be read a weight at a time; None where they can.
    """

    def __init__(self, name: str, num_classes: int | None = None):
        """
        Args:
            name: a local folder, or a name on the hub that the cache has.
            num_classes: None for a causal language model; else it classifies.
        Raises:
            UserError: there is no such model, or it cannot be read.
        """
        self.name, self.num_classes, folder = name, num_classes, hub.model_folder(name)
        if folder is None:
            raise UserError(f"the model {name} is not cached", "--base", hub.model_hint(name, "--base"))
        self.folder = folder
        try:
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.model = self._on_meta()
            if missing := hub.missing_weights(folder):
                raise ValueError(f"it lacks {', '.join(missing)}")
            self._files = {file: safe_open(folder / file, framework="pt") for file in self._file_names()}
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        self.file_of = {key: file for file, opened in self._files.items() for key in opened.keys()}  # noqa: SIM118
        self.weight: dict[str, str] = {}
        self.problem = self._find_weights()

    @cached_property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by name; tied ones once."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def header(self, key: str) -> Header:
        stored = self._files[self.file_of[key]].get_slice(key)
        return stored.get_dtype(), tuple(stored.get_shape())

    def read(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        return self._files[self.file_of[key]].get_tensor(key)

    def reader(self, dtype: torch.dtype) -> Callable[[str], Tensor]:
        """A function that reads a weight by its name, cast to `dtype`; a classifier's head is no such weight.

        Where there is a `problem`, the complete model is loaded first.
        """
        if self.problem:
            weights = dict(self.load(dtype).named_parameters())
            return lambda name: weights[name].detach()
        key_of = {name: key for key, name in reversed(self.weight.items())}  # the first of several keys
        return lambda name: self.read(key_of[name]).to(dtype)

    def load(self, dtype: torch.dtype, folder: Path | None = None) -> nn.Module:
        """The complete model on the CPU, from here or from another folder.

        Raises:
            UserError: transformers cannot load it.
        """
        auto_class, options = self._how_to_load()
        if options:
            options["ignore_mismatched_sizes"] = True  # of the head, which is the adapter's
        folder = folder or self.folder
        try:
            return auto_class.from_pretrained(folder, dtype=dtype, **options)
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error

    def _on_meta(self) -> nn.Module:
        import transformers

        auto_class, options = self._how_to_load()
        config = transformers.AutoConfig.from_pretrained(self.folder, **options)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised")
        with torch.device("meta"):
            return auto_class.from_config(config)

    def _how_to_load(self) -> tuple[type, dict[str, int]]:
        """The class that loads the model, and its options."""
        import transformers

        if self.num_classes is None:
            return transformers.AutoModelForCausalLM, {}
        return transformers.AutoModelForSequenceClassification, {"num_labels": self.num_classes}

    def _file_names(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        index = self.folder / INDEX
        if not index.is_file():
            return []
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if odd := [name for name in names if Path(name).name != name]:  # which a merge would write to
            raise ValueError(f"{INDEX} names a file in another folder: {odd[0]!r}")
        return names

    def _find_weights(self) -> str | None:
        """Fill `weight`; returns the problem, if there is one."""
        if not self._files:
            return "its weights are not in safetensors files"
        names: dict[int, list[str]] = {}  # of one weight, where it is tied
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for first, *others in names.values():
            keys = [key for name in (first, *others) for key in self._keys_for(name) if key in self.file_of]
            if not keys and first != HEAD:
                return f"its files have no {first}: its keys are converted as it loads"
            for key in keys:
                dtype, shape = self.header(key)
                if first != HEAD and (shape != self.shape[first] or dtype not in FLOATS):
                    return f"{key} is stored as {dtype} {shape}, the weight is {self.shape[first]}"
                self.weight[key] = first
        return None

    def _keys_for(self, name: str) -> list[str]:
        """What a weight may be called in the files: a decoder's checkpoint omits the prefix."""
        prefix = f"{self.model.base_model_prefix}."
        return [name, name.removeprefix(prefix)] if name.startswith(prefix) else [name]


def _unreadable(folder: Path, error: Exception) -> UserError:
    fix = "give a folder with config.json and weights that transformers loads"
    return UserError(f"cannot read the model: {error}", str(folder), fix)


class Fingerprint:
    """`model.fingerprint.fingerprint` of weights that come one at a time, in any order."""

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
