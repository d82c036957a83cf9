"""The loss of label tokens without their logits, against the model's own, torch's chunked one and Liger's.

    python benchmarks/loss.py [--quick] [--dtype float32 bfloat16] [--json PATH]

One call is forward and backward of a head's loss, to the gradient of its input; the head is frozen. `time`
and `peak` (bytes alive beside input and weight) are over those of logits and `cross_entropy`. On a CPU bytes
are counted by operation, which does not see into torch's own. Liger's runs on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from counting import peak_bytes  # noqa: E402
from kernels import milliseconds  # noqa: E402
from markdown import print_table  # noqa: E402

from speft_ds.env import machine_facts, versions  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.model.linear_cross_entropy import HeadLoss, LogitTransform  # noqa: E402

# Tokens, vocabulary, width: SmolLM2, Llama 2, Llama 3, Qwen 2.5.
CASES = [
    (512, 49152, 576),
    (2048, 49152, 576),
    (2048, 32000, 2048),
    (1024, 128256, 2048),
    (1024, 151936, 2048),
]
GPU_CASES = [(8192, 32000, 4096), (8192, 128256, 4096), (8192, 151936, 3584)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the second case alone")
    parser.add_argument("--tiny", action="store_true", help="one small case: a rehearsal")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "loss.json")
    return parser.parse_args()


def ways(hidden: Tensor, head: nn.Linear, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> the loss, each by another way."""
    positions = torch.arange(len(targets), device=targets.device)
    ours = HeadLoss(head, LogitTransform(), hidden.device.type)

    def at_head() -> Tensor:
        with ours.compute(positions, targets, 1.0) as losses:
            head(hidden[None])
        return losses[0]

    def plain() -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    found = {"plain": plain, "ours": at_head}
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions()
        found["torch"] = lambda: F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="sum", options=options
        )
    if hidden.is_cuda:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return found
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda: liger(head.weight, hidden, targets)
    return found


def measure(case: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict]:
    """One row a way."""
    num_tokens, vocabulary, width = case
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(False)
    hidden = torch.randn(num_tokens, width, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,), device=device)
    calls = {
        name: lambda loss=loss: torch.autograd.grad(loss(), hidden)[0]
        for name, loss in ways(hidden, head, targets).items()
    }
    exact = torch.autograd.grad(
        F.cross_entropy(F.linear(hidden.float(), head.weight.float()), targets, reduction="sum"), hidden
    )[0].float()
    errors = {name: ((call().float() - exact).norm() / exact.norm()).item() for name, call in calls.items()}
    spent = milliseconds(calls, rounds, device)
    before = peak_bytes(lambda: None, device)
    peak = {
        name: peak_bytes(call, device) - before
        for name, call in calls.items()
        if hidden.is_cuda or name != "torch"
    }
    return [
        {
            "way": name,
            "dtype": str(dtype).removeprefix("torch."),
            "num_tokens": num_tokens,
            "vocabulary": vocabulary,
            "width": width,
            "ms": spent[name],
            "time_over_plain": spent[name] / spent["plain"],
            "peak_mib": peak[name] / 2**20 if name in peak else None,
            "peak_over_plain": peak[name] / peak["plain"] if name in peak else None,
            "gradient_error": errors[name],
        }
        for name in calls
    ]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else CASES
    cases = [(64, 96, 32)] if arguments.tiny else cases[1:2] if arguments.quick else cases
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    rows = [
        row for dtype in dtypes for case in cases for row in measure(case, dtype, device, arguments.rounds)
    ]
    shown = [
        [
            row["dtype"],
            f"{row['num_tokens']:,} x {row['vocabulary']:,} x {row['width']:,}",
            row["way"],
            f"{row['ms']:.0f}",
            f"{row['time_over_plain']:.2f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            "" if row["peak_mib"] is None else f"{row['peak_over_plain']:.3f}",
            f"{row['gradient_error']:.1e}",
        ]
        for row in rows
    ]
    header = [
        "dtype",
        "tokens x vocabulary x width",
        "way",
        "ms",
        "time",
        "peak MiB",
        "peak",
        "gradient error",
    ]
    print_table(header, shown)
    write_json(arguments.json, {"machine": machine_facts(), "versions": versions(), "rows": rows})
    print(arguments.json)


if __name__ == "__main__":
    main()
