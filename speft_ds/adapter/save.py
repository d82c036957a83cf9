"""Writing adapters: what a run learned, from every rank's shards; and what is derived from others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speft_ds.adapter.card import write_card
from speft_ds.adapter.format import Adapter, Entries, write_adapter
from speft_ds.adapter.low_rank import write_low_rank
from speft_ds.comm import collectives
from speft_ds.errors import UserError, shell
from speft_ds.io import lies_in
from speft_ds.model.low_rank import LowRank
from speft_ds.selection.topk import gather_indices
from speft_ds.sparse.layout import Layout
from speft_ds.sparse.state import SparseState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_adapter(
    folder: Path,
    state: SparseState,
    facts: dict,
    low_rank: LowRank | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write all entries ever trained (and not reverted) to `folder`; every rank calls this, rank 0 writes.

    Args:
        facts: `base`, `dtype`, `fingerprint`, `recipe`, `mask` and whatever else a reader should know.
        low_rank: the matrices among the whole weights of `state`, which are written as PEFT does.
        tokenizer: with new tokens; None: there are none.
    Raises:
        UserError: on every rank, when rank 0 cannot write (disk full, no permission) or a delta is NaN.
    """
    local, delta = state.modified_entries()
    numel = {name: state.mask.numel(name) for name in state.mask.shape}
    index = gather_indices(local, numel)
    layout = Layout.of(index, numel, collectives.world_size())
    by_rank = collectives.all_gather_padded(delta, layout.lengths)
    whole = state.gather_whole()
    facts = {**facts, "shapes": state.mask.shape}
    save_tokenizer = tokenizer and tokenizer.save_pretrained
    write_matrices, own = None, whole
    if low_rank is not None:
        start = low_rank.gather_start()
        own = {name: value for name, value in whole.items() if name not in low_rank.targets}
        write_matrices = partial(
            write_low_rank, low_rank=low_rank, whole=whole, start=start, base=facts["base"]
        )

    def write() -> None:
        entries = join_shards(index, layout, by_rank)
        write_adapter(
            folder, entries, facts, own, write_low_rank=write_matrices, save_tokenizer=save_tokenizer
        )

    collectives.run_on_rank0(write)


def join_shards(
    index: dict[str, Tensor], layout: Layout, by_rank: list[Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Global indices and every rank's flat deltas -> (weight, index, delta), a weight at a time."""
    for name, positions in index.items():
        delta = [values[layout.places(name, rank)] for rank, values in enumerate(by_rank)]
        yield name, positions, torch.cat(delta)


def write_derived(
    output: str | Path,
    facts: dict,
    entries: Callable[[str], Entries],
    whole: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
) -> Adapter:
    """Write an adapter whose entries are computed a weight at a time, and its card.

    Args:
        output: a folder that is new or empty.
        facts: of adapter.json, with `shapes` of all targets; what they say of the mask is counted here.
        entries: weight name -> entries; called once per weight, in the order of `shapes`.
        whole: weight name -> values, all of which are stored.
        dtype: of the deltas, fp32 or bf16.
        tokenizer: the folder of one with new tokens; None: there are none.
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
        if not (num_trainable := sum(per_layer.values())) and not whole:
            raise UserError("no entry is left", str(output), "keep more, or take other adapters")
        num_target_elements = sum(map(math.prod, facts["shapes"].values()))
        facts["mask"] |= {  # in time: write_adapter writes facts last
            "num_trainable": num_trainable,
            "num_target_elements": num_target_elements,
            "density": num_trainable / max(1, num_target_elements),
            "per_layer": per_layer,
        }

    if output.is_dir():
        output.rmdir()
    try:
        save_tokenizer = tokenizer and partial(_copy_files, tokenizer)
        write_adapter(output, counted(), facts, whole, dtype, save_tokenizer=save_tokenizer)
        write_card(output, [])
    except OSError as error:
        fix = "free space, or choose another folder"
        raise UserError(f"cannot write the adapter: {error}", str(output), fix) from error
    return Adapter.open(output)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, without links that lead elsewhere."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and lies_in(path, source):
            shutil.copyfile(path, target / path.name)


def check_output(output: str | Path) -> Path:
    """The folder to write to, absolute. Raises UserError where something is in it."""
    output = Path(output).absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        fix = f"choose another, or: {shell('rm', '-r', output)}"
        raise UserError(f"{output} is there already", "OUTPUT", fix)
    return output


def history(adapters: Sequence[Adapter], made_by: dict) -> list[dict]:
    """How an adapter came to be: what its only source says of itself, and this step."""
    before = adapters[0].facts.get("history") if len(adapters) == 1 else None
    sources = [{"folder": a.folder.name, "tensors_sha256": a.facts["tensors_sha256"]} for a in adapters]
    return [*(before if isinstance(before, list) else []), {**made_by, "of": sources}]
