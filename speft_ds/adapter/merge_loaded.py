"""Merging into a model in memory: for checkpoints whose files cannot be read a weight at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speft_ds.adapter.apply import check_base, set_config
from speft_ds.io import same_bits

if TYPE_CHECKING:
    from speft_ds.adapter.merge import Merge


@torch.no_grad()
def write_loaded(job: Merge, folder: Path, max_bytes: int | None) -> int:
    """Load the base on the CPU, merge, and have transformers write it; returns the bytes of the weights.

    Raises:
        UserError: another base, or too little space.
        OSError: it cannot be written, or reads back differently.
    """
    from speft_ds.adapter.merge import check_space

    model = job.base.load(job.run_dtype)
    check_base(model, job.adapter)
    for name, parameter in model.named_parameters():
        parameter.data = job.weight(name, parameter.data)
    set_config(model, job.adapter.facts)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    check_space(folder, total)
    model.save_pretrained(folder, **({} if max_bytes is None else {"max_shard_size": max_bytes}))
    written = job.base.load(job.dtype, folder).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in written or not same_bits(tensor, written[name]):
            raise OSError(f"{name} read back differs from what was written")
    return total
