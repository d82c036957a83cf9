"""Peak memory and communication volume of a run, per rank: measured and counted, not estimated.

Bytes of the process at its peak are what is allocated on a GPU, and what is resident on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.env import log_rank0
from speft_ds.model.kinds.target import Target
from speft_ds.model.quantise import plain_parameters, quantised_linears
from speft_ds.sparse.gradient import SparseGradient
from speft_ds.sparse.optim.optimizers import FlatOptimizer
from speft_ds.sparse.state import SparseState
from speft_ds.sparse.storage import Overlay
from speft_ds.zero.engine import SparseEngine

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """From here on, `peak_bytes` forgets what was before; where that cannot be, a line says so."""
    if collectives.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError as error:
        log_rank0(f"note: the peak of memory is that of the complete run, selection included: {error}")


def peak_bytes() -> int:
    """The most bytes held since `reset_peak`, or since the process began where that cannot be reset."""
    if collectives.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def peak_gib() -> float:
    """The same in GiB, as users are told it."""
    return peak_bytes() / 2**30


def resources(
    engine: SparseEngine,
    state: SparseState,
    gradient: SparseGradient,
    optimizer: FlatOptimizer,
    num_micro_batches: int,
) -> dict:
    """Peak memory while this rank trained, the tensors that it keeps, and what it sends per step."""
    return {
        "peak_bytes": peak_bytes(),
        "memory_breakdown": memory_breakdown(engine, state, gradient, optimizer),
        "comm_volume": comm_volume(gradient, num_micro_batches),
    }


def note_saved_inputs(targets: Iterable[Target], checkpointing: str) -> None:
    """Say how many layers have their input made again: another norm or kernel keeps it from that.

    Args:
        checkpointing: `train.activation_checkpointing`, with which inputs are saved anyway.
    """
    modules = {id(target.module): target.module for target in targets if target.weight_grad_hook is not None}
    saves = [getattr(module, "saves_input", True) for module in modules.values()]
    seen = [is_saved for is_saved in saves if is_saved is not None]  # None: not reached by a forward
    if any(seen) and checkpointing == "none":
        log_rank0(f"note: {seen.count(False)} of {len(seen)} layer inputs are made again, not saved")


def tensor_bytes(values: Iterable[object], exclude: Iterable[object] = ()) -> int:
    """Bytes of all tensors that these objects hold, each storage once, without those that `exclude` holds."""
    others = _storages(list(exclude))
    return sum(size for key, size in _storages(list(values)).items() if key not in others)


def _storages(value: object) -> dict[int, int]:
    """Address -> bytes of the storages of tensors in lists, dicts and attributes of our own objects."""
    if isinstance(value, Tensor):
        parts = [value]
        if value.layout == torch.sparse_csr:
            parts = [value.crow_indices(), value.col_indices(), value.values()]
        storages = [part.untyped_storage() for part in parts]
        return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    if is_dataclass(value) or type(value).__module__.startswith("speft_ds."):
        value = getattr(value, "__dict__", {})
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {key: size for item in items for key, size in _storages(item).items()}


def memory_breakdown(
    engine: SparseEngine, state: SparseState, gradient: SparseGradient, optimizer: FlatOptimizer
) -> dict[str, int]:
    """Bytes of the tensors that this rank keeps on its device through training, by kind, as `speft plan`
    names them. Activations and gathered weights come and go: only the peak has them.
    """
    parameters = list(engine.module.parameters())
    persistent = [p for p in parameters if p.ds_persist and p.ds_zero_partition_world_size > 1]
    mask = list(state.mask.index.values())
    index = [index for index in state.index.values() if index.device.type == state.device.type]
    return {
        "base shard": _shard_bytes(plain_parameters(engine.module), state.device),
        **_few_bits_breakdown(engine, state),
        "small weights, gathered": sum(p.ds_numel * p.element_size() for p in persistent),
        "mask": tensor_bytes(mask),
        "gradient": tensor_bytes([gradient.own]),
        "gradient buckets": gradient.peak_buffer_bytes,
        "gradient pattern": tensor_bytes(gradient.kernels.values(), exclude=mask),
        "index": tensor_bytes(index, exclude=mask),
        "base values": tensor_bytes([state.base]),
        "delta": tensor_bytes([state.delta]),
        "optimizer": tensor_bytes([optimizer.state[state.delta], vars(optimizer)], exclude=[state.delta]),
    }


def _few_bits_breakdown(engine: SparseEngine, state: SparseState) -> dict[str, int]:
    """The same of what weights in few bits consist of; nothing where there are none."""
    linears = quantised_linears(engine.module)
    if not linears:
        return {}
    overlays = [storage for storage in state.storages.values() if isinstance(storage, Overlay)]
    places = [each.own for each in overlays if each.own.device.type == state.device.type]
    original = [linear.original for linear in linears if linear.original is not None]
    return {
        "codes": _shard_bytes([linear.packed for linear in linears], state.device),
        "scales": _shard_bytes([linear.scales for linear in linears], state.device),
        "values": _shard_bytes([each.values for each in linears if each.values is not None], state.device),
        "places of values": tensor_bytes(places),
        "original weights": tensor_bytes(original) if state.device.type == "cpu" else 0,
    }


def _shard_bytes(parameters: list[nn.Parameter], device: torch.device) -> int:
    """Of this rank's shards on this kind of device."""
    return sum(p.ds_tensor.nbytes for p in parameters if p.ds_tensor.device.type == device.type)


def comm_volume(gradient: SparseGradient, num_micro_batches: int) -> dict[str, int]:
    """Bytes that this rank sends per optimizer step, by kind: a reduce-scatter of each bucket after every
    micro-batch, on a ring. ZeRO-3's own gathers are not counted; `speft plan` has them.
    """
    elements = sum(bucket.row_length for bucket in gradient.buckets)  # for each of the other ranks
    return {"gradient": 4 * elements * (gradient.world_size - 1) * num_micro_batches}
