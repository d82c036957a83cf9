"""Is anything lost? A training run is killed again and again, resumed, and compared with an undisturbed one.

    python benchmarks/faults.py [--kills 40] [--points 20] [--ranks 2] [--seed 0]

Each row is one run that checkpoints every 2 steps: `kill -9` of one rank or of all of them, at a random
moment of its training (`--kills`), or just before a random file operation (`--points`: open,
rename, remove and so on in the run folder); then `--resume auto`. Identical means, bit for bit: the adapter,
every part of the last checkpoint (deltas, moments, steps), and losses and norms in metrics.jsonl, each step
once. Redone are the steps that the killed run had logged beyond the checkpoint that was resumed from. The
mask schedules take turns.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from live import LiveRun, metrics, whole_steps  # noqa: E402
from markdown import print_table  # noqa: E402

from speft_ds.env import machine_facts  # noqa: E402
from speft_ds.io import write_json  # noqa: E402

STEPS, EVERY = 16, 2
MASKS = {
    "static": {},
    "periodic": {"schedule": "periodic", "update_every": 3},
    "sft_ag": {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5, "growth_steps": 3},
    "sft_ma": {"schedule": "drop_grow", "growth": "sft_ma", "update_every": 4},
    "grad_topk": {"schedule": "grad_topk", "topk_fraction": 0.3},
}


@dataclass(frozen=True)
class KillAt:
    """Ends its process without warning before file operation number `point` (from 1) in its run folder.

    Args:
        point: 0: never, only count, in `counter`.
    """

    point: int
    folder: Path
    counter: Path | None = None

    def __call__(self) -> None:
        seen = 0

        def look(event: str, arguments: tuple) -> None:
            nonlocal seen
            is_file = event == "open" or event.startswith(("os.", "shutil."))
            if is_file and arguments and str(arguments[0]).startswith(f"{self.folder}/"):
                seen += 1
                if self.counter is not None:
                    self.counter.write_text(str(seen))
                if seen == self.point:
                    signal.raise_signal(signal.SIGKILL)

        sys.addaudithook(look)


class Trials:
    """Runs of one small model, killed and resumed.

    Args:
        folder: of everything.
        ranks: of every run.
    """

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks, self.number = folder, ranks, 0
        paths = {"untied": tiny.make_model(folder / "model"), "data": tiny.make_data(folder)}
        train = {"steps": STEPS, "checkpoint_every": EVERY}
        for name, mask in MASKS.items():
            recipe = tiny.recipe_values(paths, mask=mask, optimizer={"weight_decay": 0.1}, train=train)
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        self.undisturbed: dict[str, Path] = {}

    def run(self, mask: str, output: Path, *more: str, **options) -> LiveRun:
        """Start a run, under any number of ranks."""
        self.number += 1
        log = self.folder / f"log-{self.number}"
        arguments = ["--recipe", str(self.folder / f"{mask}.yaml"), f"output_dir={output}", *more]
        return LiveRun(log, arguments, options.pop("num_ranks", self.ranks), **options)

    def reference(self, mask: str) -> Path:
        """The folder of the undisturbed run of a schedule, made once; its file operations are counted."""
        if mask not in self.undisturbed:
            output = self.folder / f"undisturbed-{mask}"
            hooks = {
                rank: KillAt(0, output, self.folder / f"count-{mask}-{rank}") for rank in range(self.ranks)
            }
            run = self.run(mask, output, hooks=hooks)
            if any(run.codes()):
                raise RuntimeError(run.text())
            self.undisturbed[mask] = output
        return self.undisturbed[mask]

    def num_points(self, mask: str, rank: int) -> int:
        """File operations of a rank in the run folder."""
        self.reference(mask)
        return int((self.folder / f"count-{mask}-{rank}").read_text())

    def kill_in_time(self, mask: str, victims: list[int], step: int, delay: float) -> dict:
        """Kill ranks a delay in seconds after a step was logged; a step takes about 0.1 s."""
        self.reference(mask)
        output = self.folder / f"run-{self.number}"
        run = self.run(mask, output)
        run.wait_for(f"step {step:>5}/")
        time.sleep(delay)
        for victim in victims:
            if run.processes[victim].is_alive():
                run.signal(signal.SIGKILL, victim)
        who = "all ranks" if len(victims) == self.ranks else f"rank {victims[0]}"
        return self.resume(mask, output, run, f"step {step} + {delay * 1000:.0f} ms", who)

    def kill_in_save(self, mask: str, rank: int, point: int) -> dict:
        """Kill a rank just before a file operation."""
        output = self.folder / f"run-{self.number}"
        run = self.run(mask, output, hooks={rank: KillAt(point, output)})
        return self.resume(mask, output, run, f"file operation {point}", f"rank {rank}")

    def resume(self, mask: str, output: Path, run: LiveRun, moment: str, who: str) -> dict:
        """Let a killed run end, resume it, and compare what comes out."""
        codes = run.codes()
        logged = len((output / "metrics.jsonl").read_text().splitlines()) if logs(output) else 0
        whole = whole_steps(output)
        again = self.run(mask, output, "--resume", "auto")
        ended = again.codes()
        started = re.search(r"resuming from \S+: step (\d+)", again.text())
        step = int(started.group(1)) if started else 0
        finished = "is finished" in again.text()
        same = not any(ended) and identical(output, self.reference(mask))
        shutil.copy(again.log, output / "resumed.log")
        return {
            "mask": mask,
            "killed": who,
            "at": moment,
            "exit codes": " ".join(map(str, codes)),
            "logged steps": logged,
            "resumed from": "finished" if finished else step,
            "redone": 0 if finished else max(0, logged - step),
            "newest kept": finished or step == max(whole, default=0),
            "identical": same,
        }


def logs(output: Path) -> bool:
    return (output / "metrics.jsonl").is_file()


def identical(output: Path, reference: Path) -> bool:
    """Whether two run folders came to the same end, bit for bit."""
    if metrics(output) != metrics(reference):
        return False
    files = ["adapter/adapter.safetensors"]
    parts = sorted((reference / "checkpoints" / f"step_{STEPS:06d}").glob("*.safetensors"))
    files += [str(path.relative_to(reference)) for path in parts]
    return all(
        (output / f).is_file() and (output / f).read_bytes() == (reference / f).read_bytes() for f in files
    )


def trials(folder: Path, kills: int, points: int, ranks: int, seed: int):
    """Yields a row per trial."""
    draw, made = random.Random(seed), Trials(folder, ranks)
    for number in range(kills):
        mask = list(MASKS)[number % len(MASKS)]
        victims = list(range(ranks)) if draw.random() < 0.5 else [draw.randrange(ranks)]
        yield made.kill_in_time(mask, victims, draw.randint(1, STEPS - 2), draw.uniform(0, 0.1))
    for number in range(points):
        mask, rank = list(MASKS)[number % len(MASKS)], draw.randrange(ranks)
        yield made.kill_in_save(mask, rank, draw.randint(1, made.num_points(mask, rank)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "faults.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = trials(Path(folder), arguments.kills, arguments.points, arguments.ranks, arguments.seed)
        for row in made:
            rows.append(row)
            print(f"{len(rows)}: {row}", file=sys.stderr, flush=True)
    header = list(rows[0])
    print_table(header, [[str(row[key]) for key in header] for row in rows])
    good = [row["identical"] and row["newest kept"] for row in rows]
    print("\nidentical, and resumed from the newest whole checkpoint:")
    print(f"killed at a random moment: {sum(good[: arguments.kills])} of {arguments.kills}")
    print(f"killed at a random file operation: {sum(good[arguments.kills :])} of {arguments.points}")
    write_json(arguments.json, {"machine": machine_facts(), "rows": rows})
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
