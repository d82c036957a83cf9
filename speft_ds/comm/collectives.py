"""Every collective call of the package, and who we are among the ranks.

Collectives are never called inside `if rank == 0`; each function here must be entered by all ranks.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from speft_ds import env
from speft_ds.comm import deepspeed_shm, signals, watchdog
from speft_ds.errors import UserError

T = TypeVar("T")

# torch 2.13 renames these two and warns at every call of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_side_group = None  # all ranks; for sums beside other collectives


def init(timeout_minutes: float = 30.0) -> None:
    """Join the process group that the launcher described; a single process becomes a group of one.

    Args:
        timeout_minutes: after which a collective that some rank does not enter fails on the others.
    Raises:
        UserError: on rank 0, where another program listens on the port of the group.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed calls torch's collectives by the names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
    env.init_env()
    # The whole backward on this thread, which the watchdog reads; autograd has one of its own for a GPU.
    torch.autograd.set_multithreading_enabled(False)
    timeout = timedelta(minutes=timeout_minutes)
    # Before the first collective: NCCL's object collectives use the current device.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        if device().type == "cpu":
            deepspeed_shm.wait_for_build(deepspeed_shm.extensions_folder() / deepspeed_shm.NAME)
        try:
            with redirect_stdout(io.StringIO()):  # every rank would print that DeepSpeed's op is built
                deepspeed.init_distributed(verbose=False, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            what = f"port {os.environ['MASTER_PORT']} is taken, maybe by another run on this machine"
            fix = f"deepspeed --master_port {env.free_port()} ...; with srun: export MASTER_PORT=..."
            raise UserError(what, "the launcher", fix) from error
        unlink_shared_buffers()
    global _side_group
    if _side_group is None:
        _side_group = dist.new_group(timeout=timeout)
        # NCCL connects a group at its first collective, which would be in the middle of a backward.
        dist.all_reduce(torch.zeros(1, device=device()), group=_side_group)


def start_watchdog(timeout_minutes: float, advice: Callable[[], str]) -> None:
    """Have the failure of any rank end all of them; see `watchdog.Watchdog`."""
    # A connection of its own: the run's other client may wait in it for long.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    store = dist.PrefixStore(f"watchdog {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    processes = all_gather_objects(watchdog.own_process())
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_beside_agent = has_agent and processes[rank()][0] == processes[0][0]
    timeout_s = timeout_minutes * 60
    watchdog.current = watchdog.Watchdog(store, rank(), processes, timeout_s, advice, is_beside_agent)


def unlink_shared_buffers() -> None:
    """Free this rank's shared-memory buffer when the processes end, however they end.

    DeepSpeed's CPU collectives leave 66 MiB per rank in /dev/shm after every run, until the machine is out
    of memory. Once all ranks have mapped the buffers, their names are not needed any more.
    """
    barrier()
    key = "_".join([str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(rank())])
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{key}").unlink(missing_ok=True)


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def device() -> torch.device:
    """The device that this rank computes on, as DeepSpeed's accelerator names it."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def synchronize() -> None:
    """Wait for all that was started on this rank's device."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def _counted(collective: Callable) -> Callable:
    """Count the ranks' entries: the others wait for the rank that has entered the fewest collectives."""

    @functools.wraps(collective)
    def entered(*args, **kwargs):
        watchdog.heartbeat(counts=True)
        return collective(*args, **kwargs)

    return entered


@_counted
def barrier() -> None:
    dist.barrier()


@_counted
def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


@_counted
def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


@_counted
def broadcast_object(value: object) -> object:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@_counted
def all_gather_objects(value: object) -> list:
    """Every rank's picklable value, by rank."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@_counted
def all_gather_padded(local: Tensor, lengths: list[int]) -> list[Tensor]:
    """Concatenate-able pieces of unequal length from all ranks, by rank.

    Args:
        local: [lengths[rank]] this rank's piece.
        lengths: the piece length of every rank, the same list on all ranks.
    """
    longest = max(lengths)
    if longest == 0:
        return [local.new_empty(0) for _ in lengths]
    padded = local.new_zeros(longest)
    padded[: local.numel()] = local
    gathered = local.new_empty(longest * len(lengths))
    _all_gather(gathered, padded)
    return [piece[:length] for piece, length in zip(gathered.view(-1, longest), lengths, strict=True)]


@_counted
def start_reduce_scatter(pieces: Tensor) -> Callable[[], Tensor]:
    """Start to sum [world_size, n] pieces over ranks, beside other work; the pieces must stay as they are.

    On a group of its own, so that only these sums must come in one order on all ranks: where they fall
    between the gathers of ZeRO-3 may differ. The buckets go in one fixed order (`sparse.gradient`), and
    ZeRO-3 gathers in the order of the modules, so each group has the same calls on every rank.

    Returns:
        what waits for the sum and returns this rank's [n] row of it.
    """
    own = torch.empty_like(pieces[0])
    work = _reduce_scatter(own, pieces.reshape(-1), group=_side_group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return own

    return wait


@_counted
def all_to_all(pieces: Tensor) -> Tensor:
    """Row r of [world_size, n] goes to rank r; returns [world_size, n], row s from rank s.

    A reduce-scatter whose summation order the caller fixes: the sum over rows does not depend on how the
    collective library walks the ranks.
    """
    if world_size() == 1:
        return pieces
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces)
    return received


@_counted
def gather(piece: Tensor, owner: int) -> Tensor | None:
    """[world_size, n] pieces of all ranks, on the owner alone; None elsewhere."""
    pieces = piece.new_empty(world_size(), piece.numel()) if rank() == owner else None
    dist.gather(piece, None if pieces is None else list(pieces), dst=owner)
    return pieces


@_counted
def scatter(pieces: Tensor | None, owner: int, length: int) -> Tensor:
    """This rank's [length] row of the owner's [world_size, length] fp32 pieces; None on the other ranks."""
    own = torch.empty(length, dtype=torch.float32, device=device())
    dist.scatter(own, None if pieces is None else list(pieces), src=owner)
    return own


def run_on_rank0(action: Callable[[], T]) -> T | None:
    """Run a file operation on rank 0; its failure is every rank's failure.

    Returns:
        what the action returns, on rank 0; None on the others.
    Raises:
        UserError: on every rank, where rank 0 raised one or could not write (disk full, no permission).
    """
    problem = value = None
    if rank() == 0:
        try:
            value = action()
        except UserError as error:
            problem = error
        except OSError as error:
            fix = "free space, or choose another output_dir"
            problem = UserError(f"cannot write: {error}", where="the run folder", fix=fix)
    problem = broadcast_object(problem)
    if problem is not None:
        raise problem
    return value


def local_rank0_first(action: Callable[[], T]) -> T:
    """Run an action on one rank per node, then on the others; a failure is every rank's failure.

    Raises:
        UserError: on every rank, where an action raised one.
    """
    is_first = os.environ["LOCAL_RANK"] == "0"
    for is_turn in (is_first, not is_first):
        problem = None
        if is_turn:
            try:
                value = action()
            except UserError as error:
                problem = error
        for other in all_gather_objects(problem):
            if other is not None:
                raise other
    return value


def raise_if_stop_requested() -> None:
    """Stop here, on all ranks, if one was asked to. Raises Stopped.

    One number is exchanged, which is cheap enough for every batch; reasons only where there is one.
    """
    is_asked = torch.tensor([float(signals.stop_reason() is not None)], device=device())
    if all_reduce_max(is_asked).item():
        raise signals.Stopped(next(reason for reason in all_gather_objects(signals.stop_reason()) if reason))


def same_on_all_ranks(value: object) -> bool:
    """Whether every rank passed an equal value; the answer is the same on every rank."""
    values = all_gather_objects(value)
    return all(other == values[0] for other in values)
