"""Writing what a run learned from every rank's shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.format import write_adapter
from speft_ds.comm import collectives
from speft_ds.selection.topk import gather_indices
from speft_ds.sparse.layout import Layout
from speft_ds.sparse.state import SparseState


def save_adapter(folder: Path, state: SparseState, facts: dict) -> None:
    """Write all entries ever trained (and not reverted) to `folder`; every rank calls this, rank 0 writes.

    Args:
        facts: `base`, `dtype`, `fingerprint`, `recipe` and whatever else a reader should know.
    Raises:
        UserError: on every rank, when rank 0 cannot write (disk full, no permission) or a delta is NaN.
    """
    local, delta = state.modified_entries()
    numel = {name: state.mask.numel(name) for name in state.mask.shape}
    index = gather_indices(local, numel)
    layout = Layout.of(index, numel, collectives.world_size())
    by_rank = collectives.all_gather_padded(delta, layout.lengths)
    heads = state.gather_heads()
    facts = {**facts, "shapes": state.mask.shape, "mask": state.mask.facts()}
    collectives.run_on_rank0(lambda: write_adapter(folder, join_shards(index, layout, by_rank), facts, heads))


def join_shards(
    index: dict[str, Tensor], layout: Layout, by_rank: list[Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Global indices and every rank's flat deltas -> (weight, index, delta), a weight at a time."""
    for name, positions in index.items():
        delta = [values[layout.places(name, rank)] for rank, values in enumerate(by_rank)]
        yield name, positions, torch.cat(delta)
