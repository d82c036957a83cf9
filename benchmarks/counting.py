"""Bytes of one training step: alive at most, saved for the backward, sent to other ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speft_ds.tools.plan.activations import LiveBytes


def storages(tensor: Tensor) -> Iterator:
    """The storages of a tensor, sparse ones included."""
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor]
    for part in parts:
        yield part.untyped_storage()


def live_tensors() -> list[Tensor]:
    """Every tensor that this process holds: weights, optimizer state, buffers."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


class AllBytes(LiveBytes):
    """Bytes of all storages alive: those there before, and those made inside the block, while they live."""

    def __enter__(self):
        for tensor in live_tensors():
            for storage in storages(tensor):
                self._count(storage)
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    self._count(storage)
        return result


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes that are alive at a time in a step, with all that lived before it.

    On a GPU the allocator's count; on a CPU that of every storage that an operation makes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with AllBytes() as live:
        step()
    return live.peak


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a forward saves for its backward, each storage once, without the model's own; and its loss.

    Weights that ZeRO-3 has gathered are the model's own for as long as the parameter has them.
    """
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        own = {item.data.untyped_storage()._cdata for item in [*model.parameters(), *model.buffers()]}
        for storage in storages(tensor):
            if storage._cdata not in own:
                held[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    return sum(held.values()), loss


def alive_bytes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a forward leaves behind, whatever holds them, each storage once; and its loss."""
    with AllBytes() as live:
        before = live.now
        loss = forward()
        return live.now - before, loss


class Traffic(TorchDispatchMode):
    """Counts what a rank sends in collectives on a ring of `world_size` ranks.

    A reduce-scatter or an all-gather of n bytes over all ranks sends n (W - 1) / W, an all-reduce twice that.

    Attributes:
        gradients: bytes of reductions: gradients, and the few of their norm.
        weights: bytes of all-gathers.
    """

    def __init__(self, world_size: int):
        super().__init__()
        self.share = (world_size - 1) / world_size
        self.gradients = self.weights = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            self._add(name, max(sum(leaf.nbytes for leaf in tensors_in(value)) for value in args[:2]))
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, num_bytes: int) -> None:
        if "reduce" in name or "alltoall" in name:
            self.gradients += num_bytes * self.share * (2 if "allreduce" in name else 1)
        elif "allgather" in name:
            self.weights += num_bytes * self.share


def tensors_in(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
