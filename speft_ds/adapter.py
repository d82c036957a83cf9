"""The adapter on disk: what a run learnt, and applying it to a plain `transformers` model.

adapter.safetensors    per weight: `<name>.index` sorted global flat indices, `<name>.delta` fp32;
                       of a classifier's head, which the base has not, `<name>.value` whole
adapter.json           format version, base fingerprint and dtype, shapes, mask facts, recipe

trained weight = pretrained weight, with (base + delta).to(dtype) at the indices
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from speft_ds import distributed
from speft_ds.errors import UserError
from speft_ds.files import flush_to_disk, write_json
from speft_ds.partition import Layout
from speft_ds.selection import gather_indices
from speft_ds.sparse import SparseState
from speft_ds.tensor_files import write_safetensors

FORMAT_VERSION = 1
TENSORS, FACTS = "adapter.safetensors", "adapter.json"


def save_adapter(folder: Path, state: SparseState, facts: dict) -> None:
    """Write all entries ever trained (and not reverted) to `folder`; every rank calls this, rank 0 writes.

    Written to a temporary folder, read back and compared, then renamed.

    Args:
        facts: `fingerprint`, `dtype`, `recipe` and whatever else a reader should know.
    Raises:
        UserError: on every rank, when rank 0 cannot write (disk full, no permission) or a delta is NaN.
    """
    local, delta = state.touched()
    numel = {name: state.mask.numel(name) for name in state.mask.shape}
    index = gather_indices(local, numel)
    layout = Layout.of(index, numel, distributed.world_size())
    by_rank = distributed.all_gather_padded(delta, layout.lengths)
    heads = {f"{name}.value": value.cpu() for name, value in state.whole_heads().items()}
    facts = {**facts, "num_entries": sum(layout.lengths), "mask": state.mask.facts()}
    distributed.on_rank_0(
        lambda: write_adapter(folder, adapter_tensors(index, layout, by_rank) | heads, facts)
    )


def adapter_tensors(index: dict[str, Tensor], layout: Layout, by_rank: list[Tensor]) -> dict[str, Tensor]:
    """Global indices and every rank's flat deltas -> per weight index and delta, on the CPU."""
    tensors = {}
    for name, positions in index.items():
        if positions.numel() == 0:
            continue
        delta = [values[layout.local_slice(name, rank)] for rank, values in enumerate(by_rank)]
        tensors[f"{name}.index"] = positions.cpu().contiguous()
        tensors[f"{name}.delta"] = torch.cat(delta).cpu().contiguous()
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write both files atomically: a temporary folder, flushed, read back, renamed."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_safetensors(temporary / TENSORS, tensors)
        digest = hashlib.sha256((temporary / TENSORS).read_bytes()).hexdigest()
        write_json(temporary / FACTS, {"format_version": FORMAT_VERSION, "tensors_sha256": digest, **facts})
        flush_to_disk(temporary)
        read_adapter(temporary)  # every check that a later reader makes
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed when it was almost done
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of an adapter folder, checked.

    Raises:
        UserError: a file is missing, damaged or of another format version; deltas are not finite.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"not a readable adapter: {error}", where=str(folder)) from error
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"adapter format {facts.get('format_version')}, this version reads {FORMAT_VERSION}",
            where=str(folder),
        )
    if hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest() != facts.get("tensors_sha256"):
        raise UserError(
            "the adapter is damaged: its hash is not the recorded one", where=str(folder / TENSORS)
        )
    for name, tensor in tensors.items():
        if not name.endswith(".index") and not torch.isfinite(tensor).all():
            raise UserError(f"{name} is not finite", where=str(folder / TENSORS))
    return tensors, facts


@torch.no_grad()
def apply_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Turn a pretrained model into the trained one, in place and bit for bit.

    Args:
        model: the plain `transformers` base, loaded in the dtype that the run trained in; for a classifier
            an `AutoModelForSequenceClassification` with `num_labels`, whose head is replaced.
        folder: the run's `adapter` folder.
    Returns:
        The same model.
    Raises:
        UserError: another base, another dtype, a sharded model, or a damaged adapter; nothing is changed.
    """
    tensors, facts = read_adapter(folder)
    weights = dict(model.named_parameters())
    heads = {n.removesuffix(".value"): value for n, value in tensors.items() if n.endswith(".value")}
    for name, value in heads.items():
        check_head(name, value, weights, folder)
    check_base(model, facts, folder)
    names = [name.removesuffix(".index") for name in tensors if name.endswith(".index")]
    for name in names:
        check_entries(name, tensors[f"{name}.index"], weights[name], folder)
    for name in names:
        flat = weights[name].data.view(-1)
        index = tensors[f"{name}.index"].to(flat.device, torch.int64)
        delta = tensors[f"{name}.delta"].to(flat.device)
        flat[index] = (flat[index].float() + delta).to(flat.dtype)
    for name, value in heads.items():
        weights[name].copy_(value)
    if classes := facts.get("classes"):
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: number for number, name in enumerate(classes)}
        model.config.get_text_config().pad_token_id = facts["pad_token_id"]  # by which a row's end is found
    return model


def check_base(model: nn.Module, facts: dict, folder: str | Path) -> None:
    """Refuse a model that is not the base the adapter was trained on."""
    from speft_ds.model import fingerprint

    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):  # no DeepSpeed needed here
        raise UserError(
            "the model is sharded by ZeRO-3", where="apply_adapter", fix="load it without DeepSpeed"
        )
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtypes != {facts["dtype"]}:
        raise UserError(
            f"the adapter was trained on {facts['dtype']} weights, the model has {', '.join(sorted(dtypes))}",
            where=str(folder),
            fix=f"load the base with dtype=torch.{facts['dtype']}",
        )
    if fingerprint(model) != facts["fingerprint"]:
        raise UserError(
            "the adapter was trained on another base: the weights of this model have another fingerprint",
            where=str(folder),
            fix=f"load {facts['base']} unchanged (an adapter that is already applied changes it, too)",
        )


def check_head(name: str, value: Tensor, weights: dict[str, nn.Parameter], folder: str | Path) -> None:
    """Refuse a model without this head, or with one of another shape."""
    if name not in weights or weights[name].shape != value.shape:
        raise UserError(
            f"the adapter is a classifier's, with a head {name} of shape {tuple(value.shape)}",
            where=str(folder),
            fix=f"load the base by AutoModelForSequenceClassification, num_labels={value.shape[0]}",
        )


def check_entries(name: str, index: Tensor, weight: nn.Parameter, folder: str | Path) -> None:
    """Refuse indices that are out of range or not strictly increasing."""
    in_range = bool(index[0] >= 0) and bool(index[-1] < weight.numel())
    if not in_range or not bool((index[1:] > index[:-1]).all()):
        raise UserError(f"{name}: indices out of range or unsorted", where=str(Path(folder) / TENSORS))
