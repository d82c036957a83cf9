"""What checkpoints cost: their size, and how long training waits for them.

    python benchmarks/checkpoints.py [--recipe quickstart] [--steps 24] [--every 3] [--ranks 2] [KEY=VALUE]

One run on CPU ranks through the launcher. `waited` is the time that the training loop spent on a checkpoint
(copying the state, agreeing that all parts are there, publishing), against the median step. `beside a save`
compares the steps during which a part is being written with the others: the writer shares the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from markdown import print_table  # noqa: E402

from speft_ds.env import machine_facts  # noqa: E402
from speft_ds.io import write_json  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "checkpoints.json")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args()


def run(arguments: argparse.Namespace, folder: Path) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", str(arguments.ranks), ROOT / "launch" / "train.py"]
    command += ["--recipe", arguments.recipe, f"output_dir={folder}", f"train.steps={arguments.steps}"]
    command += [f"train.checkpoint_every={arguments.every}", "eval.tasks=[]", *arguments.overrides]
    subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True)


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    facts = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    warm = [line for line in lines if line["step"] > 3]
    beside = [line["step_ms"] for line in warm if line["step"] % arguments.every == 1 % arguments.every]
    alone = [line["step_ms"] for line in warm if line["step"] % arguments.every != 1 % arguments.every]
    last = max((folder / "checkpoints").iterdir())
    step = statistics.median(line["step_ms"] for line in warm)
    waited = 1000 * facts["timings_s"]["checkpoints"] / (arguments.steps // arguments.every)
    return {
        "entries": facts["mask"]["num_trainable"],
        "density": facts["mask"]["density"],
        "ranks": facts["world_size"],
        "bytes": sum(path.stat().st_size for path in last.iterdir()),
        "step_ms": step,
        "waited_ms": waited,
        "waited_of_step": waited / step,
        "beside_a_save": statistics.median(beside) / statistics.median(alone) if beside and alone else None,
    }


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as parent:
        run(arguments, Path(parent) / "run")
        row = measure(arguments, Path(parent) / "run")
    shown = {
        "entries": f"{row['entries']:,} ({row['density']:.2%})",
        "MB": f"{row['bytes'] / 1e6:.2f}",
        "bytes per entry": f"{row['bytes'] / row['entries']:.2f}",
        "step ms": f"{row['step_ms']:.0f}",
        "waited ms": f"{row['waited_ms']:.1f}",
        "of a step": f"{row['waited_of_step']:.2%}",
        "beside a save": "" if row["beside_a_save"] is None else f"{row['beside_a_save']:.3f}",
    }
    print_table(list(shown), [list(shown.values())])
    write_json(arguments.json, {"machine": machine_facts(), "rows": [row]})


if __name__ == "__main__":
    main()
