"""What all commands share that make an adapter out of others: finding, checking and writing adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.card import write_card
from speft_ds.adapter.format import FACTS, Adapter, Entries, write_adapter
from speft_ds.errors import UserError


def open_adapter(path: str | Path) -> Adapter:
    """The adapter in a folder, or in the folder of its run. Raises UserError."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / FACTS).is_file():
            return Adapter.open(folder)
    fix = "give an adapter's folder, or the folder of a run that has finished"
    raise UserError("there is no adapter", where=str(path), fix=fix)


def check_output(output: str | Path) -> Path:
    """The folder to write to, absolute. Raises UserError where something is in it."""
    output = Path(output).absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} is there already", "OUTPUT", f"choose another, or: rm -r {output}")
    return output


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose deltas belong to different weights. Raises UserError."""
    first, fix = adapters[0], "take adapters of one base"
    for other in adapters[1:]:
        where = f"{first.folder} and {other.folder}"
        if other.facts["fingerprint"] != first.facts["fingerprint"]:
            raise UserError(_difference(first.facts, other.facts), where, fix)
        for name in first.shape.keys() & other.shape.keys():
            if first.shape[name] != other.shape[name]:
                what = f"{name} is {first.shape[name]} in one adapter and {other.shape[name]} in the other"
                raise UserError(what, where, fix)


def _difference(a: dict, b: dict) -> str:
    """Why two adapters with different fingerprints of the base do not fit."""
    of_bfloat16 = a.get("fingerprint_bfloat16")
    if of_bfloat16 and of_bfloat16 == b.get("fingerprint_bfloat16") and a["dtype"] != b["dtype"]:
        return f"the adapters were trained in different dtypes of one base: {a['dtype']} and {b['dtype']}"
    return f"the adapters are of different bases: {a['base']} and {b['base']} (their fingerprints differ)"


def write_derived(
    output: str | Path,
    facts: dict,
    entries: Callable[[str], Entries],
    heads: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Write an adapter whose entries are computed a weight at a time, and its card.

    Args:
        output: a folder that is new or empty.
        facts: of adapter.json, with `shapes` of all targets; what they say of the mask is counted here.
        entries: weight name -> entries; called once per weight, in the order of `shapes`.
        heads: weight name -> values, all of which are stored.
        dtype: of the deltas, fp32 or bf16.
    Returns:
        The new adapter.
    Raises:
        UserError: no entry is left, a delta is not finite, or the folder cannot be written.
    """
    output, per_layer = check_output(output), {}
    facts = {**facts, "mask": {}}

    def counted() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in facts["shapes"]:
            index, delta = entries(name)
            per_layer[name] = index.numel()
            yield name, index, delta
        if not any(per_layer.values()):
            raise UserError("no entry is left", str(output), "keep more, or take other adapters")
        facts["mask"].update(_mask_facts(per_layer, facts["shapes"]))  # write_adapter writes facts last

    if output.is_dir():
        output.rmdir()
    try:
        write_adapter(output, counted(), facts, heads, dtype)
        write_card(output, [])
    except OSError as error:
        fix = "free space, or choose another folder"
        raise UserError(f"cannot write the adapter: {error}", str(output), fix) from error
    return Adapter.open(output)


def _mask_facts(per_layer: dict[str, int], shapes: dict[str, Sequence[int]]) -> dict:
    """What adapter.json says of the entries: their number, by weight, and their share of the targets."""
    num_trainable = sum(per_layer.values())
    num_target_elements = sum(rows * columns for rows, columns in shapes.values())
    return {
        "num_trainable": num_trainable,
        "num_target_elements": num_target_elements,
        "density": num_trainable / num_target_elements,
        "per_layer": per_layer,
    }


def history(adapters: Sequence[Adapter], made_by: dict) -> list[dict]:
    """How an adapter came to be: what its only source says of itself, and this step."""
    before = adapters[0].facts.get("history") if len(adapters) == 1 else None
    sources = [
        {"folder": adapter.folder.name, "tensors_sha256": adapter.facts["tensors_sha256"]}
        for adapter in adapters
    ]
    return [*(before if isinstance(before, list) else []), {**made_by, "of": sources}]
