"""Sparse weight gradients against the dense one: every backend, by shape, tokens and density.

    python benchmarks/kernels.py [--quick] [--dtype float32 bfloat16] [--threads 1] [--json PATH]

One call is what one layer's backward costs beside its activation gradient: casts, transposes, product, all
that happens every time. `over dense` is the median time over that of the `dense` backend in the same rounds;
`over GEMM` over the plain product grad_y^T x in the activations' dtype, which is what autograd would do, and
which rounds its result to that dtype. `chosen` marks what `train.sparse_backend=auto` takes, by the costs
that are measured on this device first, or, with SPEFT_DS_KERNELS=rules, by rules of thumb.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from markdown import print_table  # noqa: E402

from speft_ds.env import kernels_are_measured, machine_facts, versions  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.sparse.kernels.backends import make_backend  # noqa: E402
from speft_ds.sparse.kernels.costs import KernelCosts  # noqa: E402
from speft_ds.sparse.kernels.measure import find_costs  # noqa: E402
from speft_ds.sparse.kernels.triton_backends import is_available  # noqa: E402

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048), (2048, 5632)]
GPU_SHAPES = [(4096, 4096), (11008, 4096), (5120, 5120), (13824, 5120), (14336, 4096), (8192, 8192)]
TOKENS = [64, 256, 1024, 4096]
DENSITIES = [0.001, 0.0035, 0.01, 0.05]
QUICK = {"shapes": [(192, 576), (576, 576), (2048, 2048)], "tokens": [64, 1024]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and tokens")
    parser.add_argument("--tiny", action="store_true", help="one small shape: a rehearsal")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "kernels.json")
    return parser.parse_args()


def available_backends(device: torch.device) -> list[str]:
    """Those that can compute the entries of any mask on this device."""
    if device.type == "cpu":
        return ["dense", "sampled", "columns"]
    return ["dense", "element", "columns"] if is_available() else ["dense", "columns"]


def milliseconds(
    calls: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median of each call; they take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # warm by then
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    shape: tuple[int, int],
    num_tokens: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    costs: KernelCosts | None,
) -> list[dict]:
    """One row a backend."""
    generator = torch.Generator().manual_seed(0)
    numel = shape[0] * shape[1]
    index = torch.randperm(numel, generator=generator)[: round(density * numel)].sort().values
    index = index.to(device, torch.int32)
    # The input arrives as a new tensor at every backward: shared work is not carried over from call to call.
    x = torch.randn(num_tokens, shape[1], generator=generator).to(device, dtype)
    grad_y = torch.randn(num_tokens, shape[0], generator=generator).to(device, dtype)
    calls: dict[str, Callable[[], Tensor]] = {"GEMM": lambda: grad_y.t() @ x}
    for name in available_backends(device):
        _, backend = make_backend(name, index, shape)
        calls[name] = lambda backend=backend: backend(x.view(x.shape), grad_y)
    spent = milliseconds(calls, rounds, device)
    chosen, _ = make_backend("auto", index, shape, costs=costs, num_tokens=num_tokens)
    return [
        {
            "backend": name,
            "chosen": name == chosen,
            "dtype": str(dtype).removeprefix("torch."),
            "out_features": shape[0],
            "in_features": shape[1],
            "num_tokens": num_tokens,
            "density": density,
            "ms": spent[name],
            "over_dense": spent[name] / spent["dense"],
            "over_gemm": spent[name] / spent["GEMM"],
        }
        for name in available_backends(device)
    ]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, tokens = (GPU_SHAPES, [8192]) if device.type == "cuda" else (SHAPES, TOKENS)
    if arguments.quick:
        shapes, tokens = (shapes[:2], tokens) if device.type == "cuda" else QUICK.values()
    if arguments.tiny:
        shapes, tokens = [(48, 64)], [32]
    rows = []
    for dtype in arguments.dtype:
        costs = find_costs(device, dtype) if kernels_are_measured() else None
        for shape in shapes:
            for num_tokens in tokens:
                for density in arguments.densities:
                    rows += measure(
                        shape, num_tokens, density, getattr(torch, dtype), device, arguments.rounds, costs
                    )
    shown = [
        [
            row["dtype"],
            f"{row['out_features']} x {row['in_features']}",
            f"{row['num_tokens']:,}",
            f"{row['density']:.2%}",
            row["backend"] + (" *" if row["chosen"] else ""),
            f"{row['ms']:.2f}",
            f"{row['over_dense']:.3f}",
            f"{row['over_gemm']:.3f}",
        ]
        for row in rows
        if row["backend"] != "dense" or row["chosen"]
    ]
    header = ["dtype", "out x in", "tokens", "density", "backend", "ms", "over dense", "over GEMM"]
    print_table(header, shown)
    worst = max((row for row in rows if row["chosen"]), key=lambda row: row["over_dense"])
    print(f"\n* chosen by train.sparse_backend=auto; at worst {worst['over_dense']:.2f} times dense")
    write_json(arguments.json, {"machine": machine_facts(), "versions": versions(), "rows": rows})
    print(arguments.json)


if __name__ == "__main__":
    main()
