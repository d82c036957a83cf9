"""What activations in few bits save, and cost: bytes, time, loss.

    python benchmarks/stash.py [--model PATH | --config FILE | --geometry NAME] [--dtype float32] [--quick]
    python benchmarks/stash.py ... --recipe quickstart [--steps 60] [key.sub=value ...]

A step of ours on one batch, without a stash and with each format, one process each, which take turns, a step
at a time. With a recipe, it is also trained once with each value of `train.stash`, on one rank, in folders
below --output; a run that is finished is not repeated. There `dynamic` has its row, too.

    kept     bytes that are alive after a forward and were not before: all that the backward needs
    peak     most bytes alive in a step, weights and optimizer state included
    step     median time over that without a stash; cpu: the same of the processor's time
    loss     the mean of the last 10 steps; validation: on eval.validation; and how far they are from those
             without a stash
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from groups import Case, Group, settle  # noqa: E402
from markdown import print_table  # noqa: E402
from models import QUICK_ROUNDS, add_model_arguments, add_run_arguments, find_model  # noqa: E402
from rounds import Runner  # noqa: E402

from speft_ds.errors import UserError  # noqa: E402
from speft_ds.io import read_json, write_json  # noqa: E402
from speft_ds.training.run_dir import METRICS, read_facts  # noqa: E402

FORMATS = (None, "bfp8", "bfp4")
ROUNDS = 7
NUM_LAST = 10  # steps whose loss is averaged


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser)
    add_run_arguments(parser, "stash", ROUNDS)
    parser.add_argument("--recipe", help="also train this recipe, with each value of train.stash")
    parser.add_argument("--steps", type=int, default=60, help="of each of these runs")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "stash")
    parser.add_argument("--only-train", action="store_true", help="leave out the step")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the recipe")
    return parser.parse_intermixed_args()


def measure(case: Case, rounds: int, limit_s: float) -> list[dict]:
    """A row for each format, the first one without a stash."""
    with ExitStack() as stack:
        runners = {}
        for stash in FORMATS:
            group = stack.enter_context(Group("speft_ds", replace(case, stash=stash), 1, limit_s))
            runners[stash] = Runner(group)
        for number in range(rounds):
            for stash in FORMATS if number % 2 else reversed(FORMATS):
                runners[stash].step()
        rows = []
        for stash, runner in runners.items():
            counted = runner.ask("count_alive") | runner.ask("count_peak")
            rows.append(
                {
                    "stash": stash,
                    "kept_bytes": counted["alive_bytes"],
                    "peak_bytes": counted["peak_bytes"],
                    "step_ms": 1000 * median(runner.seconds),
                    "cpu_ms": 1000 * median(runner.cpu_seconds),
                    "losses": runner.losses,
                }
            )
        return rows


def keep_settings(arguments: argparse.Namespace) -> None:
    """Note what the runs below --output are made with; ends the program where that was something else."""
    path = arguments.output / "settings.json"
    settings = {"recipe": arguments.recipe, "steps": arguments.steps, "overrides": arguments.overrides}
    if path.is_file() and read_json(path) != settings:
        sys.exit(f"{path} has other settings: choose another --output, or remove the old one")
    write_json(path, settings)


def train(stash: str | None, arguments: argparse.Namespace) -> dict:
    """What a run with this stash came to; it is made if it was not. Ends the program where it fails."""
    name = stash or "null"
    folder, log = arguments.output / name, arguments.output / f"{name}.log"
    values = [f"train.stash={name}", f"train.steps={arguments.steps}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "speft_ds.cli.main", "train", arguments.recipe, "--ranks", "1"]
    if read_facts(folder).get("finished") is not True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*command, "--resume", "auto", *arguments.overrides, *values]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("ab") as file:
            how = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
            code = subprocess.run(words, check=False, **how).returncode
        if code:
            sys.exit(f"the run with train.stash={name} failed: see {log}")
    lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    (resources,) = read_facts(folder)["resources"]
    return {
        "stash": stash,
        "loss": mean(line["loss"] for line in lines[-NUM_LAST:]),
        "validation": lines[-1].get("validation_loss"),
        "formats": [line.get("stash") for line in lines],
        "saved": resources["saved"],
        "peak_bytes": resources["peak_bytes"],
    }


def in_words(formats: list[str | None]) -> str:
    """The formats of a run's steps: `bfp4, from step 41 bfp6`."""
    starts = [
        (step, name)
        for step, name in enumerate(formats, 1)
        if step == 1 or name != formats[step - 2]
    ]  # fmt: skip
    return ", ".join((f"from step {step} " if step > 1 else "") + (name or "") for step, name in starts)


def print_steps(rows: list[dict]) -> None:
    base = rows[0]
    print_table(
        ["stash", "kept MiB", "kept", "peak MiB", "step", "cpu", "step ms"],
        [
            [
                row["stash"] or "null",
                f"{row['kept_bytes'] / 2**20:.0f}",
                f"{row['kept_bytes'] / base['kept_bytes']:.3f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['step_ms'] / base['step_ms']:.2f}",
                f"{row['cpu_ms'] / base['cpu_ms']:.2f}",
                f"{row['step_ms']:.0f}",
            ]
            for row in rows
        ],
    )


def print_runs(rows: list[dict]) -> None:
    base = rows[0]

    def beside(row: dict, key: str) -> str:
        value = row[key]
        return "" if value is None else f"{value:.4f} ({value - base[key]:+.4f})"

    print_table(
        ["train.stash", "formats", "loss", "validation"],
        [
            [row["stash"] or "null", in_words(row["formats"]), beside(row, "loss"), beside(row, "validation")]
            for row in rows
        ],
    )


def main() -> None:
    settle()
    arguments = parse_arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    if arguments.recipe:
        keep_settings(arguments)
    facts: dict = {}
    if not arguments.only_train:
        with tempfile.TemporaryDirectory() as work:
            model, name = find_model(arguments, Path(work), default="27M" if arguments.quick else None)
            case = Case(model, arguments.dtype, arguments.rows, arguments.length)
            steps = measure(case, rounds, 60 * arguments.limit_minutes)
        print(f"\n{name}, {case.dtype}, {case.rows} x {case.length} tokens, medians of {rounds} rounds\n")
        print_steps(steps)
        facts |= {"model": name, "dtype": case.dtype, "tokens": case.rows * case.length, "steps": steps}
    if arguments.recipe:
        runs = [train(stash, arguments) for stash in (*FORMATS, "dynamic")]
        print(f"\n{arguments.recipe} {' '.join(arguments.overrides)}, {arguments.steps} steps\n")
        print_runs(runs)
        facts |= {"recipe": arguments.recipe, "overrides": arguments.overrides, "runs": runs}

    from speft_ds.env import machine_facts  # late: imports torch, which the ranks do for themselves

    write_json(arguments.json, {"machine": machine_facts(), **facts})
    print(f"\n{arguments.json}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
