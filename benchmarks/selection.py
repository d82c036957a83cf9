"""What choosing a mask costs: scoring and selection over a frozen forward and backward, same rows, same run.

    deepspeed --num_gpus 2 benchmarks/selection.py [--recipe quickstart] [--quick] [key.sub=value ...]

Rounds of both are interleaved; the table has medians, and ratios of medians to the frozen one's. The JSON
file has every round and the machine. `--quick` scores 16 rows, in 2 rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speft_ds.entry import checked_recipe, use_all_cores  # noqa: E402

QUICK = ["mask.calibration_samples=16"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, help="default: 5; with --quick 2")
    parser.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "selection.json")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    overrides = [*(QUICK if arguments.quick else []), *arguments.overrides]
    use_all_cores()
    from markdown import print_table

    from speft_ds import distributed
    from speft_ds.base import Base
    from speft_ds.engine import require_grad
    from speft_ds.files import write_json
    from speft_ds.machine import machine, versions
    from speft_ds.metrics import Timings
    from speft_ds.recipe import without_training
    from speft_ds.salience import score
    from speft_ds.selection import select

    recipe = checked_recipe("score", arguments.recipe, overrides, 1)
    distributed.init()
    base = Base(without_training(recipe, distributed.world_size()), Timings())
    base.read_calibration_rows(None)
    base.load()
    scorer, module = base.scorer(), base.engine.module
    module.eval()
    seconds: dict[str, list[float]] = {"frozen forward and backward": [], "salience": [], "selection": []}

    # For the frozen backward, which nothing else asks for; scoring walks as far, or ZeRO-3 would trace anew.
    module.get_input_embeddings().register_forward_hook(require_grad)

    def frozen() -> None:
        for batch, _ in scorer.calibration.batches():
            base.loss(module, batch).backward()
            base.engine.after_plain_backward()

    def timed(name: str, work):
        distributed.barrier()
        start = time.perf_counter()
        result = work()
        distributed.barrier()
        seconds[name].append(time.perf_counter() - start)
        return result

    frozen()  # warm-up: allocators, ZeRO-3's trace
    for _ in range(rounds):
        timed("frozen forward and backward", frozen)
        scores = timed("salience", partial(score, scorer))
        choice = partial(select, scores, base.shapes, base.num_trainable, recipe.mask.budget)
        mask = timed("selection", choice)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median["salience + selection"] = median["salience"] + median["selection"]
    floor = median["frozen forward and backward"]
    rows = [{"what": name, "seconds": value, "over_floor": value / floor} for name, value in median.items()]
    result = {
        "machine": machine(),
        "rows": rows,
        "what": f"choosing a mask by {recipe.mask.salience}, medians of {rounds} rounds",
        "recipe": recipe.model_dump(mode="json"),
        "num_tokens": sum(len(row.ids) for row in scorer.calibration.rows),
        "num_trainable": mask.num_trainable,
        "rounds_s": seconds,
        "versions": versions(),
    }

    def report() -> None:
        num_rows, world_size = len(scorer.calibration.rows), distributed.world_size()
        print(
            f"\n{result['what']}: {num_rows} rows, {result['num_tokens']:,} tokens in batches of "
            f"{recipe.mask.calibration_batch}, {recipe.model.dtype}, {world_size} rank(s)\n"
        )
        shown = [[row["what"], f"{row['seconds']:.2f}", f"{row['over_floor']:.3f}"] for row in rows]
        print_table(["", "s", "ratio"], shown)
        write_json(arguments.json, result)
        print(f"\n{arguments.json}")

    distributed.on_rank_0(report)
    distributed.barrier()


if __name__ == "__main__":
    main()
