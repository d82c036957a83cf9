"""The measured costs of the sparse backends on this device, for `speft doctor --kernels`."""

from __future__ import annotations

import os

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from speft_ds.env import KERNELS, cache_folder, kernels_are_measured
from speft_ds.report.tables import print_table
from speft_ds.sparse.kernels.costs import KernelCosts, Measurement
from speft_ds.sparse.kernels.measure import find_costs

DTYPES = ("float32", "bfloat16")
SINGLE = ("sampled", "element")  # backends that are chosen by density alone


def print_kernels(remeasure: bool = False) -> None:
    """Print the table of each dtype, measured now where there is none.

    Args:
        remeasure: also where there is one.
    Raises:
        UserError: SPEFT_DS_KERNELS has another value than it may.
    """
    is_used = kernels_are_measured()
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    for dtype in DTYPES:
        print_costs(find_costs(torch.device("cuda" if on_gpu else "cpu"), dtype, remeasure))
    print(f"kept in {cache_folder('kernels')}; speft doctor --kernels --remeasure measures anew")
    if not on_gpu:
        print("threads are those of this process; as 1 of N ranks: OMP_NUM_THREADS=cores/N in front of it")
    if not is_used:
        print(f"note: {KERNELS}=rules: runs choose by rules of thumb, not by these tables")


def print_costs(costs: KernelCosts) -> None:
    """One row per backend and mask, one column per shape and number of tokens: time over `dense`."""
    how = f"measured in {costs.seconds:.1f} s" if costs.seconds else "measured"
    print(f"{costs.device}, {costs.dtype}, torch {costs.torch}: {how}; time over that of the dense backend")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("backend")
    table.add_column("mask")
    for (rows, columns), num_tokens in costs.classes:
        table.add_column(f"{rows} x {columns}\n{num_tokens:,} tokens", justify="right")
    cells = [_numbered(costs, one) for one in costs.classes]
    for key in dict.fromkeys(key for column in cells for key in column):
        rows = [column.get(key) for column in cells]
        shown = ["-" if row is None else f"{row.over_dense:.2f}" for row in rows]
        table.add_row(key[0], _mask_of(next(filter(None, rows))), *shown)
    for name in SINGLE:
        if any(one.backend == name for one in costs.measurements):
            bounds = [f"{costs.max_density(name, *one):.1%}" for one in costs.classes]
            table.add_row(name, "faster than dense up to", *bounds)
    print_table(table)


def _numbered(costs: KernelCosts, one: tuple) -> dict[tuple[str, int], Measurement]:
    """(backend, number of its mask) -> what was measured, of one shape and number of tokens."""
    found: dict[tuple[str, int], Measurement] = {}
    for row in costs.measurements:
        if (row.shape, row.num_tokens) == one:
            found[row.backend, sum(name == row.backend for name, _ in found)] = row
    return found


def _mask_of(row: Measurement) -> str:
    return f"{row.density:.2%}" + (f" in {row.share:.0%} of the columns" if "columns" in row.backend else "")
