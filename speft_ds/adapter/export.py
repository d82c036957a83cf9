"""An adapter in the layout of PEFT's Supertuning, which a stock `PeftModel.from_pretrained` loads.

adapter_model.safetensors    per linear: `base_model.model.<module>.supertuning_indices` int32 flat indices,
                             `.supertuning_values` fp32
adapter_config.json          the linears, and one `sparsity` from which PEFT computes each linear's count

PEFT adds the values, cast to the weight's dtype, in that dtype. All linears have as many, in proportion to
their size, as the densest one: the others are filled up with values that change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speft_ds import hub
from speft_ds.adapter.apply import check_weights, with_delta
from speft_ds.adapter.format import DTYPES, Adapter, Entries, open_adapter
from speft_ds.adapter.low_rank import PEFT_TENSORS
from speft_ds.adapter.pretrained import Fingerprint, PretrainedCheckpoint
from speft_ds.adapter.save import check_output
from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError, shell
from speft_ds.io import new_folder, write_json, write_safetensors
from speft_ds.sparse.layout import INT32_ELEMENTS

PEFT_VERSION = "0.21.2"  # whose layout this is
NO_CHANGE = -0.0  # x + (-0.0) is x, also where x is -0.0


@dataclass
class Exported:
    """What was written: the adapter's entries, and `num_padding` more so that the counts fit one sparsity.

    At `num_rounded` entries PEFT's sums, in the dtype of the run, miss the trained value; None where the
    base was not cached.
    """

    num_entries: int
    num_padding: int
    num_bytes: int
    num_rounded: int | None


def export_peft(adapter: str | Path, output: str | Path, base: str | Path | None = None) -> Exported:
    """Write the adapter for PEFT.

    Args:
        adapter: its folder, or the folder of its run.
        output: a folder that is not there, or is empty.
        base: local folder or hub name, by which values are chosen whose sums in PEFT come to the trained ones
            in bfloat16 and float16, too; None: the one that the adapter names, if it is cached.
    Raises:
        UserError: another base, an output that is not empty, weights too large for int32 indices.
    """
    opened, output = open_adapter(adapter), check_output(output)
    if base_format := opened.facts.get("base_format"):
        what = f"the deltas are of a base in {base_format}, which PEFT would add to other weights"
        raise UserError(what, str(opened.folder), shell("speft", "merge", str(adapter), "OUTPUT"))
    if opened.vocabulary:
        what, fix = (
            "PEFT's layout has no place for new tokens",
            shell("speft", "merge", str(adapter), "OUTPUT"),
        )
        raise UserError(what, str(opened.folder), fix)
    numel = {name: math.prod(opened.shape[name]) for name in opened.names}
    too_large = [name for name in opened.names if numel[name] >= INT32_ELEMENTS]
    not_weight = [name for name in opened.names if not name.endswith(".weight")]
    whole = [name for name in opened.whole if name != HEAD]
    if odd := too_large + not_weight + whole:
        what, fix = f"PEFT's layout has no place for {odd[0]}", "speft merge, or apply_adapter"
        raise UserError(what, str(opened.folder), fix)
    summands, num_rounded = _summands(opened, base)
    sparsity = find_sparsity([(len(summands[name][0]), numel[name]) for name in opened.names])
    tensors = {f"base_model.model.{name}": opened.value(name) for name in opened.whole}
    num_padding = 0
    for name in opened.names:
        index, values = summands.pop(name)
        padding = peft_count(numel[name], sparsity) - len(index)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        # At different positions, so that no two sums wait for each other.
        tensors[f"{module}.supertuning_indices"] = torch.cat([index, torch.arange(padding)]).to(torch.int32)
        tensors[f"{module}.supertuning_values"] = torch.cat([values, torch.full((padding,), NO_CHANGE)])
        num_padding += padding
    with new_folder(output) as temporary:
        write_safetensors(temporary / PEFT_TENSORS, tensors, {"format": "pt"})
        write_json(temporary / "adapter_config.json", _config(opened, base, sparsity))
    return Exported(opened.num_entries, num_padding, (output / PEFT_TENSORS).stat().st_size, num_rounded)


def peft_count(numel: int, sparsity: float) -> int:
    """Entries that PEFT gives a linear of `numel` weights; in its own arithmetic."""
    return int(numel * (1 - sparsity))


def find_sparsity(counts: Sequence[tuple[int, int]]) -> float:
    """The largest sparsity with which every (count, numel) gets at least its count."""
    sparsity = 1 - max((count / numel for count, numel in counts), default=0.5)
    while sparsity > 0 and any(peft_count(numel, sparsity) < count for count, numel in counts):
        sparsity = math.nextafter(sparsity, 0)
    return sparsity


def summands_for(before: Tensor, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, int]:
    """What PEFT has to add, in the dtype of the base, to come to the trained values.

    In fp32 these are the deltas. In bfloat16 and float16 a delta would be rounded before the sum as well as
    after it: there, the difference of the values is added, and where its rounding misses, a second summand.

    Args:
        before: [n] pretrained values; `index`: [n] flat indices; `delta`: [n] fp32.
    Returns:
        [m] flat indices, second summands behind the first; [m] fp32 values; and the number of entries that
        still miss the trained value.
    """
    if before.dtype == torch.float32:
        return index, delta, 0
    trained, dtype = with_delta(before, delta), before.dtype
    first = (trained.float() - before.float()).to(dtype)
    missed = before + first != trained
    value, wanted, one = before[missed], trained[missed], first[missed]
    # CPUs add all summands in fp32 and round once, GPUs round after each: half way between what either lacks.
    lacking = (wanted.float() - value.float() - one.float(), wanted.float() - (value + one).float())
    two = (sum(lacking) / 2).to(dtype)
    at_once = (value.float() + one.float() + two.float()).to(dtype)
    # A GPU may add the second one first, and come to a neighbour of the value: its order is not fixed.
    num_missed = int(((at_once != wanted) | (value + one + two != wanted)).sum())
    return torch.cat([index, index[missed]]), torch.cat([first, two]).float(), num_missed


def _summands(adapter: Adapter, base: str | Path | None) -> tuple[dict[str, Entries], int | None]:
    """Weight -> flat indices and values to add, and how many entries miss the trained value."""
    if base is None and hub.model_folder(adapter.facts["base"]) is None:
        return {name: adapter.entries(name) for name in adapter.names}, None
    checkpoint = PretrainedCheckpoint(str(base or adapter.facts["base"]), adapter.num_classes)
    check_weights(adapter, checkpoint.shape)
    for name in adapter.names:
        if not isinstance(checkpoint.model.get_submodule(name.removesuffix(".weight")), torch.nn.Linear):
            what, fix = (
                f"PEFT trains linear layers only, and {name} is of another",
                "speft merge, or apply_adapter",
            )
            raise UserError(what, str(adapter.folder), fix)
    dtype = DTYPES[adapter.facts["dtype"]]
    seen, read = Fingerprint(checkpoint.shape, dtype), checkpoint.reader(dtype)
    summands, num_missed = {}, 0
    for name in seen.shape:
        weight = read(name)
        seen.add(name, weight)
        if name in adapter.shape:
            index, delta = adapter.entries(name)
            index, values, missed = summands_for(weight.reshape(-1)[index], index, delta)
            room = weight.numel()  # PEFT has no more, which a weight that is trained completely may need
            summands[name] = index[:room], values[:room]
            num_missed += missed + len(index[room:])
    seen.check(adapter)
    return summands, num_missed


def _config(adapter: Adapter, base: str | Path | None, sparsity: float) -> dict:
    return {
        "peft_type": "SUPERTUNING",
        "peft_version": PEFT_VERSION,
        "task_type": "SEQ_CLS" if HEAD in adapter.whole else "CAUSAL_LM",
        "base_model_name_or_path": str(base or adapter.facts["base"]),
        "inference_mode": True,
        "target_modules": [name.removesuffix(".weight") for name in adapter.names],
        "modules_to_save": [name.removesuffix(".weight") for name in adapter.whole] or None,
        "sparsity": sparsity,
        "save_precomputed_indices": True,
    }
