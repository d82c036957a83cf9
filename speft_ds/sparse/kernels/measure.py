"""The measurement from which `train.sparse_backend: auto` chooses: a few seconds at first use per device.

Every backend that runs on a device takes turns with the `dense` one, on random masks of a few shapes. The
table is kept in the user's cache, by device, torch and dtype; SPEFT_DS_KERNELS=rules does without one.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.comm import collectives, watchdog
from speft_ds.config.recipe import Recipe
from speft_ds.env import cache_folder, kernels_are_measured, log_rank0, machine_facts
from speft_ds.io import read_json, write_json
from speft_ds.sparse.kernels import triton_backends
from speft_ds.sparse.kernels.costs import FORMAT_VERSION, KernelCosts, Measurement
from speft_ds.sparse.kernels.torch_backends import ColumnsGradient, DenseGradient, SampledGradient
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient
from speft_ds.sparse.tiles import Tiles

SHAPES = {
    "cpu": [(512, 512), (1024, 1024), (2048, 2048)],
    "cuda": [(1024, 1024), (4096, 4096), (11008, 4096)],
}
NUM_TOKENS = {"cpu": [128, 1024], "cuda": [1024, 8192]}
# Densities, or (share of the columns, density).
SINGLE = {"cpu": [0.001, 0.01, 0.05, 0.2], "cuda": [0.001, 0.0035, 0.01, 0.03]}
SAMPLED_COLUMNS = [(0.05, 0.002), (0.25, 0.005), (0.25, 0.05), (0.5, 0.05)]
DENSE_COLUMNS = [(0.05, 0.02), (0.25, 0.03), (0.25, 0.1), (0.5, 0.2)]
BLOCKS, BLOCK_SIZE = [0.01, 0.05, 0.2], 16
ROUNDS, MAX_ROUNDS, ENOUGH_S = 3, 15, 0.2  # of one shape: more of what is over soon

Candidate = tuple[Measurement, Callable[[Tensor, Tensor], Tensor]]  # its tokens and cost are still to come


def device_name(device: torch.device, num_threads: int | None = None) -> str:
    """A device by all that its speed depends on.

    Args:
        num_threads: of a CPU; None: as many as this process uses.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = num_threads or torch.get_num_threads()
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{machine_facts()['cpu']}, {isa}, {threads} thread{'s' if threads > 1 else ''}"


def cache_path(device: str, dtype: str) -> Path:
    """The file of a device's table; arguments as `KernelCosts` has them."""
    key = "\n".join([str(FORMAT_VERSION), device, torch.__version__, dtype])
    return cache_folder("kernels") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_costs(device: str, dtype: str) -> KernelCosts | None:
    """The table in the cache; None where there is none. A damaged one, or another's, is said so."""
    path = cache_path(device, dtype)
    try:
        costs = KernelCosts.from_json(read_json(path))
        if (costs.device, costs.torch, costs.dtype) != (device, torch.__version__, dtype):
            raise ValueError(f"it is of {costs.device}, torch {costs.torch}, {costs.dtype}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        log_rank0(f"note: {path} is not a table of kernel costs of this device, and not used: {reason}")
        return None
    return costs


def find_costs(device: torch.device, dtype: str, remeasure: bool = False) -> KernelCosts:
    """The table of a device: from the cache, or measured now and kept there.

    Args:
        dtype: of the activations, as in a recipe.
        remeasure: also where there is a table.
    """
    name = device_name(device)
    if not remeasure and (costs := read_costs(name, dtype)) is not None:
        return costs
    log_rank0(f"measuring the sparse backends on {name}, {dtype}: once, a few seconds")
    costs = measure(device, dtype)
    path = cache_path(name, dtype)
    try:
        write_json(path, costs.to_json())
    except OSError as error:  # no reason not to use it
        log_rank0(f"note: the measured kernel costs are not kept for later runs: {error}")
    return costs


def agree_on_costs(recipe: Recipe, manifest: dict | None = None) -> KernelCosts | None:
    """The table by which all ranks choose: rank 0's, which the others wait for. All ranks call this.

    Args:
        manifest: of the checkpoint that the run goes on from, whose `kernel_costs` it keeps; None: a new run.
    Returns:
        None: the recipe names a backend, or it goes by rules of thumb.
    Raises:
        UserError: SPEFT_DS_KERNELS has another value than it may.
    """
    if recipe.train.sparse_backend != "auto":
        return None
    recorded, dtype = (manifest or {}).get("kernel_costs"), recipe.model.dtype

    def find() -> KernelCosts | None:
        if not kernels_are_measured():
            if recorded is not None:
                log_rank0(
                    "note: the run chose its kernels by measured costs: sums may now have another order"
                )
            return None
        if manifest is not None and recorded is None:
            return None  # it began by the rules
        if recorded is not None and (costs := _recorded_costs(recorded, dtype)) is not None:
            return costs
        return find_costs(collectives.device(), dtype)

    return collectives.broadcast_object(collectives.run_on_rank0(find))


def _recorded_costs(recorded: object, dtype: str) -> KernelCosts | None:
    """The table of a checkpoint, where it is of this device: the run goes on with the same kernels."""
    try:
        costs = KernelCosts.from_json(recorded)
    except ValueError:
        log_rank0("note: the checkpoint's kernel costs cannot be read: kernels are chosen anew")
        return None
    now = device_name(collectives.device())
    if (costs.device, costs.dtype) == (now, dtype):
        return costs
    log_rank0(f"note: the run's kernels were chosen for {costs.device}: chosen anew for {now}")
    return None


# The measurement


def measure(device: torch.device, dtype: str) -> KernelCosts:
    """Time every backend that runs on a device. Draws from no random state of the process."""
    start, found, generator = time.perf_counter(), [], torch.Generator(device).manual_seed(0)
    for shape in SHAPES[device.type]:
        watchdog.heartbeat(f"measuring kernels of {shape[0]} x {shape[1]}")
        candidates = _candidates(shape, generator)
        for num_tokens in NUM_TOKENS[device.type]:
            x, grad_y = (
                torch.randn(num_tokens, width, generator=generator, device=device).to(getattr(torch, dtype))
                for width in reversed(shape)
            )
            found += _measure_class(shape, candidates, x, grad_y)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the run's memory is its own
    seconds = round(time.perf_counter() - start, 3)
    return KernelCosts(device_name(device), torch.__version__, dtype, seconds, tuple(found))


def _measure_class(
    shape: tuple[int, int], candidates: list[Candidate], x: Tensor, grad_y: Tensor
) -> list[Measurement]:
    """The candidates on [tokens, in] and [tokens, out], with medians of their times over `dense` in the same
    round.
    """
    device, num_tokens = x.device, x.shape[0]
    dense = DenseGradient(torch.arange(0, shape[0] * shape[1], 100, device=device), shape)
    ratios: list[list[float]] = [[] for _ in candidates]
    failed: set[str] = set()

    # The processor time of one thread that does all of it: what else the machine does is left out.
    clock = time.thread_time if (device.type, torch.get_num_threads()) == ("cpu", 1) else time.perf_counter

    def seconds(call: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = clock()
        call(x.view(x.shape), grad_y)  # a new tensor, as at every backward: no transposed copy is shared
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    start, number = 0.0, 0
    while number <= ROUNDS or (number < MAX_ROUNDS and time.perf_counter() - start < ENOUGH_S):
        if number == 1:  # the first round warms up, and compiles
            start = time.perf_counter()
        unit = seconds(dense)
        for place, (row, call) in enumerate(candidates):
            if row.backend in failed:
                continue
            try:
                ratio = seconds(call) / unit
            except RuntimeError as error:  # Triton's, of a GPU that its programs do not suit
                log_rank0(f"note: the backend {row.backend} fails here, and is not used: {error}")
                failed.add(row.backend)
                continue
            if number:
                ratios[place].append(ratio)
        number += 1
    measured = zip(candidates, ratios, strict=True)
    return [
        replace(row, num_tokens=num_tokens, over_dense=float(f"{statistics.median(times):.4g}"))
        for (row, _), times in measured
        if row.backend not in failed
    ]


def _candidates(shape: tuple[int, int], generator: torch.Generator) -> list[Candidate]:
    """All that is timed for one shape, on the generator's device."""
    numel, found, kind = shape[0] * shape[1], [], generator.device.type

    def add(name: str, backend, index: Tensor, share: float = 1.0) -> None:
        load, density = getattr(backend, "load", 0.0), index.numel() / numel
        found.append((Measurement(name, shape, 1, density, share, load, 1.0), backend))

    on_cpu, has_triton = kind == "cpu", triton_backends.is_available()
    for density in SINGLE[kind]:
        index = _random_index(shape, 1.0, density, generator)
        if on_cpu:
            add("sampled", SampledGradient(index, shape), index)
        elif has_triton:
            add("element", ElementGradient(index, shape), index)
    inside = [("columns", False, pair) for pair in DENSE_COLUMNS]
    inside += [("sampled columns", True, pair) for pair in SAMPLED_COLUMNS if on_cpu]
    for name, samples, (share, density) in inside:
        index = _random_index(shape, share, density, generator)
        backend = ColumnsGradient(index, shape, samples)
        add(name, backend, index, backend.columns.numel() / shape[1])
    if not on_cpu and has_triton:
        tiles = Tiles.of("block", BLOCK_SIZE, shape)
        for density in BLOCKS:
            chosen = torch.randperm(tiles.num_tiles, generator=generator, device=generator.device)
            index = tiles.entries(chosen[: round(density * tiles.num_tiles)].sort().values).to(torch.int32)
            add("tiled", BlockGradient(index, shape, tiles), index)
    return found


def _random_index(shape: tuple[int, int], share: float, density: float, generator: torch.Generator) -> Tensor:
    """[about density x elements] sorted int32 flat indices, in a share of the columns."""
    width, device = max(1, round(share * shape[1])), generator.device
    columns = torch.randperm(shape[1], generator=generator, device=device)[:width].sort().values
    count = max(1, round(density * shape[0] * shape[1]))
    inside = torch.randint(shape[0] * width, (count,), generator=generator, device=device).unique()
    rows = torch.div(inside, width, rounding_mode="floor")
    return (rows * shape[1] + columns[inside - rows * width]).to(torch.int32)
