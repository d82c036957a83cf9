"""The shards of a weight under ZeRO-3: who owns which element, and this rank's own.

ZeRO-3 cuts a weight of `numel` elements into `world_size` flat shards of equal length (the last ones
padded). An entry belongs to the rank whose shard holds it:

    owner = global_index // shard_numel        local_index = global_index - owner * shard_numel
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives

# The autograd nodes of the hooks that ZeRO-3 puts around every module, and of those that stand in for them on
# a single rank (`engine.alias_inputs`): they return their tensor unchanged.
HOOK_GRAD_FNS = frozenset(
    ("PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward", "AliasBackward0")
)


CPU_NORM_ELEMENTS = 2**18  # that are squared at a time

# On which ZeRO-3 gathers; None: there is one order of all work, as on a CPU.
gather_stream = None


def shard_numel(numel: int, world_size: int) -> int:
    """Elements in one rank's shard of a weight, padding included (DeepSpeed's rule: rounded up)."""
    return -(-numel // world_size)


def shard_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the global flat indices that `rank` owns; empty where the shard is all padding."""
    size = shard_numel(numel, world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def shard_of(parameter: nn.Parameter) -> Tensor:
    """This rank's flat shard of a ZeRO-3 parameter, padding included: a live view, written in place."""
    return parameter.ds_tensor


def own_elements(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's shard without padding, and the global flat index at which it starts."""
    start, stop = own_range(parameter)
    return shard_of(parameter)[: stop - start], start


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """[start, stop) of the global flat indices in this rank's shard, padding left out."""
    rank, world_size = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
    return shard_range(parameter.ds_numel, rank, world_size)


def is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the unpartitioned weight, whether or not it is gathered right now."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape


def matrix_shape(parameter: nn.Parameter) -> tuple[int, int]:
    """(rows, columns) of a weight seen as a matrix as it is stored: the last dimension is the columns."""
    shape = full_shape(parameter)
    return shape[:-1].numel(), shape[-1]


def stack_size(parameter: nn.Parameter) -> int | None:
    """Matrices on top of each other in a weight: experts; None: it is no stack."""
    shape = full_shape(parameter)
    return shape[0] if len(shape) == 3 else None


def shard(values: Tensor, ds_config: dict) -> nn.Parameter:
    """A new frozen parameter, cut over the ranks, its shards where the DeepSpeed configuration has them.

    Args:
        values: the same on every rank; all ranks call this together.
    """
    import deepspeed  # late: not all readers train

    holder = nn.ParameterList([nn.Parameter(values, requires_grad=False)])
    deepspeed.zero.Init(module=holder, config_dict_or_path=ds_config)
    return holder[0]


def shard_like(other: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A new frozen parameter, cut over the ranks as `other` is, its shards where those of `other` are.

    Args:
        values: the same on every rank; all ranks call this together.
    """
    parameter = nn.Parameter(values, requires_grad=False)
    other.convert_to_zero_parameters([parameter])
    parameter.ds_persist = False
    return parameter


def move_shard(parameter: nn.Parameter, device: torch.device) -> None:
    """Keep this rank's shard of a weight, which nothing has gathered, on another device."""
    parameter.ds_tensor.data = parameter.ds_tensor.data.to(device)


@contextmanager
def gathered(*parameters: nn.Parameter) -> Iterator[None]:
    """Inside the block these weights are complete; all ranks enter it together, and write to none."""
    import deepspeed  # late: not all readers train

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


@contextmanager
def changing_shards(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Around every write to shards of these weights: none is gathered, and later gathers wait for the write.

    ZeRO-3 gathers on a stream of its own, which does not wait for the stream that computes.
    """
    repartition(parameters)
    yield
    gathers_wait()


def gathers_wait() -> None:
    """Have what is gathered from now on wait for what was computed until now."""
    if gather_stream is not None:
        from deepspeed.accelerator import get_accelerator

        gather_stream.wait_stream(get_accelerator().current_stream())


def repartition(parameters: list[nn.Parameter]) -> None:
    """Free gathered copies of these weights: their shards are about to change, a copy would be stale."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # late: not all readers train

    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.INFLIGHT:
            raise RuntimeError(f"{parameter.ds_summary()} is being gathered while its shard changes")
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.ds_active_sub_modules.clear()
            parameter.partition()


def global_norm(local: Tensor) -> float:
    """L2 norm of a vector that is split over the ranks; each rank passes its own part."""
    return math.sqrt(collectives.all_reduce(squared_norm(local).reshape(1)).item())


def squared_norm(local: Tensor) -> Tensor:
    """Squared L2 norm of this rank's part alone: an fp64 scalar."""
    # The CPU's kernel makes an fp64 copy of what it is given.
    parts = local.split(CPU_NORM_ELEMENTS) if local.device.type == "cpu" else (local,)
    return sum(torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts)
