"""Low-rank matrices in an adapter's folder, in the files of stock PEFT, and the weights that they make.

adapter_model.safetensors    per linear: `base_model.model.<module>.lora_A.weight` [rank, in],
                             `.lora_B.weight` [out, rank]; of DoRA `.lora_magnitude_vector` [out]
adapter_config.json          PEFT's

trained weight = W + scaling B A; of DoRA each of its rows has the magnitude as its norm
"""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt
from safetensors import safe_open
from torch import Tensor

from speft_ds.config.model_config import HEAD
from speft_ds.io import sha256_of, write_safetensors
from speft_ds.model.low_rank import ADAPTER, LowRank

if TYPE_CHECKING:
    from peft import LoraConfig

FLOATS = ("F32", "BF16", "F16")  # by safetensors' names
PEFT_TENSORS, PREFIX = "adapter_model.safetensors", "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class LowRankFacts(BaseModel):
    """What adapter.json says of the matrices; `rank` as they are stored."""

    model_config = ConfigDict(strict=True)

    sha256: str
    rank: PositiveInt
    scaling: FiniteFloat


class LowRankMatrices:
    """The matrices in a folder: header and hash are checked, those of a weight are read when it is asked for.

    Attributes:
        shape: weight name -> (out, in).

    Raises:
        OSError, ValueError, SafetensorError: the file is missing or damaged.
    """

    def __init__(self, folder: Path, facts: dict):
        self.path, self.rank, self.scaling = folder / PEFT_TENSORS, facts["rank"], facts["scaling"]
        if not self.path.is_file():  # a pipe would keep us waiting
            raise OSError(f"{self.path} is not a file")
        self._file = safe_open(self.path, framework="pt")
        if sha256_of(self.path) != facts["sha256"]:
            raise ValueError(f"the hash of {PEFT_TENSORS} is not the recorded one")
        sizes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for key in self._file.keys():  # noqa: SIM118 (it is no dict)
            part = next((part for part in (A, B, MAGNITUDE) if key.endswith(part)), "")
            if not key.startswith(PREFIX) or not key.isprintable() or not (part or key == PREFIX + HEAD):
                raise ValueError(f"{key!r} is no part of a low-rank matrix")
            if self._file.get_slice(key).get_dtype() not in FLOATS:  # before torch, which may not know it
                raise ValueError(f"{key!r} is no matrix of floats")
            if not torch.isfinite(self._file.get_tensor(key)).all():
                raise ValueError(f"{key!r} is not finite")
            if part:
                module = key.removeprefix(PREFIX).removesuffix(part)
                sizes[f"{module}.weight"][part] = tuple(self._file.get_slice(key).get_shape())
        self.shape: dict[str, tuple[int, int]] = {}
        for name, parts in sizes.items():
            (rows, rank), (also_rank, columns) = parts.get(B, (0, 0)), parts.get(A, (0, 0))
            is_right = rank == also_rank == self.rank and parts.get(MAGNITUDE, (rows,)) == (rows,)
            if not is_right:
                raise ValueError(f"{name}: its matrices are {parts}, of rank {self.rank}")
            self.shape[name] = rows, columns

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """[out, in] fp32: the trained weight, by [out, in] the weight that the matrices are beside."""
        a, b = self._read(name, A).to(weight.device), self._read(name, B).to(weight.device)
        trained = weight.float() + self.scaling * (b @ a)
        if PREFIX + name.removesuffix(".weight") + MAGNITUDE in self._file.keys():  # noqa: SIM118
            magnitude = self._read(name, MAGNITUDE).to(weight.device)
            trained *= (magnitude / torch.linalg.norm(trained, dim=1)).unsqueeze(1)
        return trained

    def _read(self, name: str, part: str) -> Tensor:
        return self._file.get_tensor(PREFIX + name.removesuffix(".weight") + part).float()


def write_low_rank(
    folder: Path, low_rank: LowRank, whole: dict[str, Tensor], start: dict[str, Tensor], base: str
) -> dict:
    """Write the matrices as PEFT does; returns what adapter.json says of them.

    Of PiSSA, whose matrices are beside a residual, those of the start are taken off again: what PEFT reads
    are matrices of twice the rank, which go beside the base.

    Args:
        whole: name of a parameter -> its values; others than the matrices are left out, but for a
            classifier's head.
        start: of PiSSA, as `LowRank.start`, complete.
        base: what the configuration names as its model.
    Raises:
        OSError: it cannot be written.
    """
    config = _config_to_save(low_rank.config, bool(start), base, HEAD in whole)
    tensors = {PREFIX + HEAD: whole[HEAD]} if HEAD in whole else {}
    for name in low_rank.targets:
        if name not in whole:  # a linear that is not used alone has none
            continue
        tensor = whole[name]
        if name in start:
            is_a = ".lora_A." in name
            tensor = torch.cat([tensor, start[name] if is_a else -start[name]], 0 if is_a else 1)
        key = name.removesuffix(".weight") if MAGNITUDE in name else name
        tensors[PREFIX + key.replace(f".{ADAPTER}", "")] = tensor.contiguous()
    write_safetensors(folder / PEFT_TENSORS, tensors, {"format": "pt"})
    config.save_pretrained(folder)
    sha256 = sha256_of(folder / PEFT_TENSORS)
    return {"sha256": sha256, "rank": config.r, "scaling": float(low_rank.scaling)}


def _config_to_save(config: LoraConfig, takes_start_off: bool, base: str, has_head: bool) -> LoraConfig:
    config = copy.copy(config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.init_lora_weights = True  # PiSSA's would take its residual again
    if takes_start_off:
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    if has_head:
        config.modules_to_save = [HEAD.removesuffix(".weight")]
    return config
