"""How the time of a step grows with the size of the model, the density and the number of ranks.

    python benchmarks/scale.py [--sizes 27M 135M 400M 1B] [--base 135M] [--ranks 1 2 4] [--quick]

Each row is a training step of ours and the floor beside it, taking turns, as `step.py` measures them: random
weights, a random mask, one micro-batch. The sizes are compared at 0.5% on one rank; densities and ranks on
`--base`. Ranks that are more than the cores share them, in the floor as in ours. An exponent is the slope of
log(step - floor) over log(weights) or log(density): 1 where the extra time is proportional.

`--quick` leaves out the large sizes, and says so. On a GPU: `--sizes meta-llama/Llama-2-7b-hf
meta-llama/Llama-2-13b-hf --base meta-llama/Llama-2-7b-hf --dtype bfloat16`, and no more ranks than GPUs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from groups import Case, Failure, say, settle  # noqa: E402
from markdown import print_table  # noqa: E402
from models import QUICK_ROUNDS, SIZES, add_run_arguments, random_model  # noqa: E402
from rounds import Floor, empty_row  # noqa: E402

from speft_ds.errors import UserError  # noqa: E402
from speft_ds.io import write_json  # noqa: E402

ROUNDS = 5
DENSITY = 0.005  # of all but the sweep over densities
DENSITIES, QUICK_DENSITIES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05], [0.001, 0.005, 0.05]
QUICK_SIZES = ["27M", "135M"]
COLUMNS = ["model", "weights", "ranks", "density", "trained", "floor ms", "extra ms", "step"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help=f"default: {' '.join(SIZES)}; names or config.json files")
    parser.add_argument("--base", help="of densities and ranks; default: 135M, with --quick the first size")
    parser.add_argument("--densities", type=float, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    add_run_arguments(parser, "scale", ROUNDS)
    return fill_in(parser.parse_args())


def fill_in(arguments: argparse.Namespace) -> argparse.Namespace:
    """The defaults that depend on --quick."""
    quick = arguments.quick
    arguments.left_out = [size for size in SIZES if size not in QUICK_SIZES] if quick else []
    if arguments.sizes is not None:
        arguments.left_out = []
    arguments.sizes = arguments.sizes or (QUICK_SIZES if quick else list(SIZES))
    arguments.base = arguments.base or (arguments.sizes[0] if quick else "135M")
    arguments.densities = arguments.densities or (QUICK_DENSITIES if quick else DENSITIES)
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    return arguments


def cases(arguments: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Size -> number of ranks -> densities: what is measured, nothing twice."""
    wanted = {(size, 1, DENSITY) for size in arguments.sizes}
    wanted |= {(arguments.base, 1, density) for density in arguments.densities}
    wanted |= {(arguments.base, ranks, DENSITY) for ranks in arguments.ranks}
    found: dict[str, dict[int, list[float]]] = {}
    for size in [arguments.base, *(size for size in arguments.sizes if size != arguments.base)]:
        for _, ranks, density in sorted(one for one in wanted if one[0] == size):
            found.setdefault(size, {}).setdefault(ranks, []).append(density)
    return found


def measure(case: Case, world_size: int, densities: list[float], arguments: argparse.Namespace) -> list[dict]:
    """A row a density, all beside one floor."""
    try:
        with Floor(case, world_size, 60 * arguments.limit_minutes) as floor:
            rows = [
                floor.measure("speft_ds", arguments.rounds, replace(case, density=density))
                for density in densities
            ]
    except Failure as failure:
        say(f"floor: {failure}\n{failure.details}")
        rows = [empty_row("speft_ds", world_size, f"no floor: {failure}") for _ in densities]
    return [{**row, "density": density} for row, density in zip(rows, densities, strict=True)]


def with_extra(row: dict) -> dict:
    """The row, and what its step takes more than the floor."""
    return {**row, "extra_ms": None if row["error"] else row["step_ms"] - row["floor_ms"]}


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x); None with less than two x, or where some y is not positive."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    return linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def fits(rows: list[dict]) -> list[dict]:
    """The exponents of the extra time on one rank."""
    good = [row for row in rows if row["world_size"] == 1 and not row["error"]]
    of_size = [(row["num_weights"], row["extra_ms"]) for row in good if row["density"] == DENSITY]
    of_density = [(row["density"], row["extra_ms"]) for row in good if row["is_base"]]
    by_name = {"num_weights": of_size, "density": of_density}
    return [
        {"over": name, "exponent": exponent(points), "num_points": len(points)}
        for name, points in by_name.items()
    ]


def shown(row: dict) -> list[str]:
    """A row as text, by COLUMNS."""

    def number(key: str, text: str) -> str:
        return "" if row[key] is None else text.format(row[key])

    return [
        row["model"],
        number("num_weights", "{:,}"),
        str(row["world_size"]),
        f"{row['density']:.2%}",
        number("num_trainable", "{:,}"),
        number("floor_ms", "{:.0f}"),
        number("extra_ms", "{:.0f}"),
        "failed" if row["error"] else number("step_over_floor", "{:.3f}"),
    ]


def main() -> int:
    settle()
    arguments, rows = parse_arguments(), []
    for size, by_ranks in cases(arguments).items():
        with tempfile.TemporaryDirectory() as work:
            model, name = random_model(Path(work), size, arguments.dtype)
            case = Case(model, arguments.dtype, arguments.rows, arguments.length)
            for ranks, densities in by_ranks.items():
                say(f"{name}, {ranks} rank(s): {len(densities)} densities")
                measured = measure(case, ranks, densities, arguments)
                rows += [
                    with_extra({**row, "model": name, "is_base": size == arguments.base}) for row in measured
                ]
    print(
        f"\n{arguments.dtype}, {arguments.rows} x {arguments.length} tokens per rank and step, medians of "
        f"{arguments.rounds} rounds, {os.cpu_count()} cores; step: over the floor's\n"
    )
    print_table(COLUMNS, [shown(row) for row in rows])
    for row in rows:
        if row["error"]:
            print(f"\n{row['model']}, {row['world_size']} rank(s), {row['density']:.2%}: {row['error']}")
    exponents = fits(rows)
    print()
    for fit in exponents:
        value = "not to be had" if fit["exponent"] is None else f"{fit['exponent']:.2f}"
        print(f"exponent of step - floor over {fit['over']}: {value} ({fit['num_points']} points)")
    if arguments.left_out:
        print(f"left out by --quick: {', '.join(arguments.left_out)}")

    from speft_ds.env import machine_facts  # late: imports torch

    write_json(arguments.json, {"machine": machine_facts(), "rows": rows, "fits": exponents})
    print(f"\n{arguments.json}")
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
