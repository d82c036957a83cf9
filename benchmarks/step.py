"""One training step over its lower bound: ours, and peers on the same model, data and machine.

    python benchmarks/step.py [--model PATH | --config FILE | --geometry NAME] [--dtype float32] [--quick]

The floor is forward and activation gradients of the frozen model. `speft_ds` trains a random mask, `shira`
and `supertuning` (PEFT) as many weights as they can choose near that density, `lora` (PEFT) rank 16, all on
the linears of the decoder layers; `full` trains everything; `--compute 0.1` adds ours with entries in few
columns, `--base-format nf4` ours on a base in few bits, beside the floor of the complete one, `--other full
lora` ours with another `method.name`. On one rank all
but ours are plain torch. On more, all run under ZeRO-3: the floor and ours on our engine, peers under plain
DeepSpeed, loaded sharded. AdamW, one thread a process, the same rows on every rank, so that losses are those
of one process: a method that raises, whose loss does not fall or is not that of one
process has its error in its row, and no figures.

    step     median time over the floor's. A method and the floor take turns, a step at a time
    cpu      the same of the time that the processor spent on it, which a busy machine disturbs less
    peak     most bytes alive in a step, weights and optimizer state included, over the floor's: of all
             tensors of the process and all that operations make; on a GPU by torch's allocator
    saved    bytes that the forward saves for the backward, each storage once, over the floor's; without
             weights, also gathered ones
    sent     bytes of gradients that a rank sends per step, on a ring: a reduce-scatter of n bytes sends
             n (W-1) / W; and the same of weights, by all-gathers
    state    bytes per rank of what is trained: values, gradient, optimizer, indices; and of the adapter's
             files; of ours

`--quick` takes a model of 27M random weights where none is named, and 3 rounds. On a GPU name a geometry,
`--dtype bfloat16 --geometry meta-llama/Llama-2-7b-hf` (or meta-llama/Meta-Llama-3-8B, Qwen/Qwen2.5-7B), and
no more ranks than there are GPUs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from groups import Case, Failure, say, settle  # noqa: E402
from markdown import print_table  # noqa: E402
from models import QUICK_ROUNDS, add_model_arguments, add_run_arguments, find_model  # noqa: E402
from rounds import OVER_FLOOR, SENT, SIZES, Floor, differs_from_alone, empty_row, failed  # noqa: E402

from speft_ds.config.values import BASE_FORMATS  # noqa: E402
from speft_ds.errors import UserError  # noqa: E402
from speft_ds.io import write_json  # noqa: E402

OTHERS = ["full", "lisa", "half", "lora", "rslora", "pissa", "dora", "sparse_lora"]
METHODS = ["speft_ds", "lora", "shira", "supertuning", "full"]
ROUNDS = 7
COLUMNS = ["method", "ranks", "trained", "step", "cpu", "peak", "saved", "sent MB", "weights MB"]
COLUMNS += ["state MB", "adapter MB", "step ms"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser)
    add_run_arguments(parser, "step", ROUNDS)
    parser.add_argument("--density", type=float, default=0.005, help="of the linears' weights")
    parser.add_argument("--compute", type=float, nargs="*", default=[], help="ours with mask.compute, too")
    parser.add_argument(
        "--base-format", nargs="*", choices=BASE_FORMATS, default=[], help="ours with model.base_format, too"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--other", nargs="*", choices=OTHERS, default=[], help="ours with this method.name, too"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    return parser.parse_args()


def measure(arguments: argparse.Namespace, case: Case, world_size: int, rounds: int) -> list[dict]:
    """The rows of one number of ranks, the floor's first."""
    try:
        with Floor(case, world_size, 60 * arguments.limit_minutes) as floor:
            rows = [floor.measure(method, rounds) for method in arguments.methods]
            for compute in arguments.compute:
                confined = replace(case, compute=compute)
                rows.append(floor.measure("speft_ds", rounds, confined, f"speft_ds, compute {compute}"))
            for base_format in arguments.base_format:
                coded = replace(case, base_format=base_format)
                rows.append(floor.measure("speft_ds", rounds, coded, f"speft_ds, {base_format}"))
            for name in arguments.other:
                other = replace(case, method=name)
                rows.append(floor.measure("speft_ds", rounds, other, f"speft_ds, {name}"))
            return [floor.own_row(), *rows]
    except Failure as failure:
        say(f"floor: {failure}\n{failure.details}")
        error = f"no floor: {failure}"
        return [empty_row(method, world_size, error) for method in ["floor", *arguments.methods]]


def compare_with_one(rows: list[dict], dtype: str) -> list[dict]:
    """The rows; those of methods that on more ranks do not train as in one process, as failed."""
    alone = {row["method"]: row for row in rows if row["world_size"] == 1 and not row["error"]}
    checked = []
    for row in rows:
        one = alone.get(row["method"])
        error = None
        if row["world_size"] > 1 and not row["error"] and one is not None and row["method"] != "floor":
            error = differs_from_alone(row, one, dtype)
        checked.append(failed(row, error) if error else row)
    return checked


def shown(row: dict) -> list[str]:
    """A row as text, by COLUMNS."""

    def number(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    return [
        row["method"],
        str(row["world_size"]),
        number(row["num_trainable"], "{:,}"),
        "failed" if row["error"] else number(row["step_over_floor"], "{:.3f}"),
        *(number(row[key], "{:.3f}") for key in OVER_FLOOR[1:]),
        *(number(row[key] and row[key] / 1e6, "{:.3g}") for key in (*SENT, *SIZES)),
        number(row["step_ms"], "{:.0f}"),
    ]


def print_errors(rows: list[dict]) -> None:
    for row in rows:
        if row["error"]:
            print(f"\n{row['method']} on {row['world_size']} rank(s): {row['error']}")


def main() -> int:
    settle()
    arguments = parse_arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    with tempfile.TemporaryDirectory() as work:
        model, name = find_model(arguments, Path(work), default="27M" if arguments.quick else None)
        case = Case(model, arguments.dtype, arguments.rows, arguments.length, arguments.density)
        rows = [row for ranks in arguments.ranks for row in measure(arguments, case, ranks, rounds)]
    facts = {"model": name, "dtype": case.dtype, "tokens": case.rows * case.length, "rounds": rounds}
    rows = [{**row, **facts} for row in compare_with_one(rows, case.dtype)]
    print(
        f"\n{name}, {case.dtype}, {case.rows} x {case.length} tokens per rank and step, density "
        f"{case.density:.3%}, medians of {rounds} rounds; step to saved over the floor's\n"
    )
    print_table(COLUMNS, [shown(row) for row in rows])
    print_errors(rows)
    if 1 not in arguments.ranks:
        print("\nwithout one rank, no method was compared with itself in one process")

    from speft_ds.env import machine_facts  # late: imports torch, which the ranks do for themselves

    write_json(arguments.json, {"machine": machine_facts(), "rows": rows})
    print(f"\n{arguments.json}")
    return int(any(row["error"] for row in rows if row["method"].startswith(("floor", "speft_ds"))))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
