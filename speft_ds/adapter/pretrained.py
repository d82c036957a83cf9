"""A pretrained checkpoint on disk, read a weight at a time under the names of its model class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from speft_ds import hub
from speft_ds.adapter.apply import another_base
from speft_ds.adapter.format import FLOATS, Adapter
from speft_ds.config.check_model import read_config
from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError
from speft_ds.io import same_bits
from speft_ds.model.fingerprint import element_hash

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Header = tuple[str, tuple[int, ...]]  # of a stored tensor: dtype, by safetensors' name, and shape


class PretrainedCheckpoint:
    """A model folder.

    Attributes:
        name: as it was given; `folder`: where it is.
        config: the contents of config.json.
        model: the model class on the meta device: names and shapes, no values.
        shape: of every weight, by name; tied ones once.
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
        self.name, self.folder = name, hub.model_folder(name)
        if self.folder is None:
            raise UserError(f"the model {name} is not cached", "--base", hub.model_hint(name, "--base"))
        self._auto_class, self._options = AutoModelForCausalLM, {}
        if num_classes is not None:
            self._auto_class, self._options = AutoModelForSequenceClassification, {"num_labels": num_classes}
        try:
            self.config = read_config(self.folder / "config.json")
            if missing := hub.missing_weights(self.folder):
                raise ValueError(f"it lacks {', '.join(missing)}")
            files = [file for file in hub.weight_files(self.folder) if file.endswith(".safetensors")]
            self._files = {file: safe_open(self.folder / file, framework="pt") for file in files}
            self.file_of = {key: file for file, opened in self._files.items() for key in opened.keys()}  # noqa: SIM118
            self.model = self._on_meta()
            if self._holds_another_head():  # than the configuration says; transformers goes by the files, too
                self._options["tie_word_embeddings"] = False
                self.model = self._on_meta()
        except UserError:
            raise
        except Exception as error:  # any type: the code of hundreds of families reads the configuration
            raise _unreadable(self.folder, error) from error
        self.shape = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self.weight: dict[str, str] = {}
        self.problem = self._find_weights()

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
        folder, options = folder or self.folder, self._options
        if "num_labels" in options:
            options = options | {"ignore_mismatched_sizes": True}  # of the head, which is the adapter's
        try:
            return self._auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
        except Exception as error:  # as above
            raise _unreadable(folder, error) from error

    def _on_meta(self) -> nn.Module:
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, **self._options)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised")
        with torch.device("meta"):
            return self._auto_class.from_config(config, trust_remote_code=False)

    def _stored_weights(self) -> Iterator[tuple[str, list[str]]]:
        """(name, keys in the files) of every weight; several keys where it is tied and stored twice."""
        # A decoder's checkpoint omits this.
        prefix = f"{self.model.base_model_prefix}."
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for group in names.values():
            stored_as = dict.fromkeys(k for n in group for k in (n, n.removeprefix(prefix)))
            yield group[0], [key for key in stored_as if key in self.file_of]

    def _holds_another_head(self) -> bool:
        """Whether a weight that is tied is stored with several values."""
        tied = [keys for _, keys in self._stored_weights() if len(keys) > 1]
        return any(not same_bits(self.read(keys[0]), self.read(key)) for keys in tied for key in keys[1:])

    def _find_weights(self) -> str | None:
        """Fill `weight`; returns the problem, if there is one."""
        if not self._files:
            return "its weights are not in safetensors files"
        for first, keys in self._stored_weights():
            if not keys and first != HEAD:
                return f"its files have no {first}: its keys are converted as it loads"
            for key in keys:
                dtype, shape = self.header(key)
                if first != HEAD and (shape != self.shape[first] or dtype not in FLOATS):
                    return f"{key} is stored as {dtype} {shape}, the weight is {self.shape[first]}"
                self.weight[key] = first
        return None


def _unreadable(folder: Path, error: Exception) -> UserError:
    fix = "give a folder with config.json and weights that transformers loads"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return UserError(f"cannot read the model: {kind}{error}", str(folder), fix)


class Fingerprint:
    """`model.fingerprint.fingerprint` of weights that come one at a time, in any order."""

    def __init__(self, shape: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.shape, self.dtype = {name: sizes for name, sizes in shape.items() if name != HEAD}, dtype
        self._hashes: dict[str, int] = {}

    def add(self, name: str, weight: Tensor) -> None:
        """Count a weight, cast to the dtype; the first of tied ones."""
        if name in self.shape and name not in self._hashes:
            self._hashes[name] = int(element_hash(weight.to(self.dtype), 0)) % 2**64

    def hexdigest(self) -> str:
        lines = [f"{n} {s} {self.dtype} {self._hashes[n]:016x}\n" for n, s in self.shape.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check(self, adapter: Adapter) -> None:
        """Refuse another base than the adapter's, once every weight was added. Raises UserError."""
        if self.hexdigest() != adapter.facts["fingerprint"]:
            raise another_base(adapter)
