"""What a rank holds while it trains, and what it sends in a step: counted, not estimated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.sparse.optim.flat import FlatOptimizer
from speft_ds.sparse.state import SparseState
from speft_ds.training import memory
from speft_ds.zero.engine import SparseEngine


def held_bytes(things: Iterable[object], but: Iterable[object] = ()) -> int:
    """Bytes of all tensors that these objects hold, each storage once, without those of others."""
    others = set(_storages(list(but)))
    return sum(size for key, size in _storages(list(things)).items() if key not in others)


def _storages(value: object) -> dict[int, int]:
    """Address -> bytes of the storages of tensors in lists, dicts and attributes of our own objects."""
    if isinstance(value, Tensor):
        parts = [value]
        if value.layout == torch.sparse_csr:
            parts = [value.crow_indices(), value.col_indices(), value.values()]
        storages = [part.untyped_storage() for part in parts]
        return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        found: dict[int, int] = {}
        for item in value:
            found |= _storages(item)
        return found
    is_ours = is_dataclass(value) or type(value).__module__.startswith("speft_ds.")
    return _storages(vars(value)) if is_ours and hasattr(value, "__dict__") else {}


def memory(
    engine: SparseEngine, state: SparseState, optimizer: FlatOptimizer, process: int
) -> dict[str, int]:
    """Bytes of this rank by kind, as `speft plan` names them; the last kind is what is left of the peak.

    Args:
        process: bytes held before the model was loaded.
    """
    parameters, gradient = list(engine.module.parameters()), state.gradient
    shards = [p.ds_tensor for p in parameters if p.ds_tensor.device.type == state.device.type]
    persistent = [p for p in parameters if p.ds_persist and p.ds_zero_partition_world_size > 1]
    mask = list(state.trained.index.values())
    kinds = {
        "process": process,
        "base shard": sum(shard.nbytes for shard in shards),
        "small weights, whole": sum(p.ds_numel * p.element_size() for p in persistent),
        "gathered weights": engine.gathers.most_whole if collectives.world_size() > 1 else 0,
        "mask": held_bytes(mask),
        "gradient": held_bytes([gradient.own]),
        "gradient buckets": gradient.peak_buffer_bytes,
        "gradient pattern": held_bytes(gradient.kernels.values(), but=mask),
        "index": held_bytes(
            [i for i in state.index.values() if i.device.type == state.device.type], but=mask
        ),
        "base values": held_bytes([state.base]),
        "delta": held_bytes([state.delta]),
        "optimizer": held_bytes([optimizer.state[state.delta], vars(optimizer)], but=[state.delta]),
    }
    return {**kinds, "activations and all else": max(0, memory.peak() - sum(kinds.values()))}


def sent(engine: SparseEngine, state: SparseState) -> dict[str, int]:
    """Bytes that this rank sent in the last step, by kind, as `speft plan` names them."""
    weights = {f"weights, {kind}": count for kind, count in engine.gathers.sent.items() if count}
    return {**weights, "gradient": state.gradient.bytes_sent}
