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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speft_ds.cli.launch import checked_recipe, use_all_cores  # noqa: E402

if TYPE_CHECKING:
    from speft_ds.config.recipe import Recipe
    from speft_ds.training.setup import TrainContext

FROZEN = "frozen forward and backward"
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


class Clock:
    """Seconds of pieces of work that all ranks do together.

    Attributes:
        rounds: name -> seconds of each time that it was done.
    """

    def __init__(self):
        self.rounds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable):
        from speft_ds.comm import collectives

        collectives.barrier()
        start = time.perf_counter()
        result = work()
        collectives.barrier()
        self.rounds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def rows(self) -> list[dict]:
        """Medians, and over the frozen pass's."""
        medians = {name: statistics.median(values) for name, values in self.rounds.items()}
        medians["salience + selection"] = medians["salience"] + medians["selection"]
        floor = medians[FROZEN]
        return [{"what": name, "seconds": s, "over_floor": s / floor} for name, s in medians.items()]


def measure(context: TrainContext, recipe: Recipe, rounds: int) -> tuple[dict, str]:
    """What is found, and a line that says on how many rows."""
    from speft_ds.comm import collectives
    from speft_ds.env import machine_facts, versions
    from speft_ds.selection.salience import score
    from speft_ds.selection.topk import select
    from speft_ds.training.setup import make_scorer
    from speft_ds.zero.engine import require_grad

    clock, scorer, module = Clock(), make_scorer(context), context.engine.module
    module.eval()
    # For the frozen backward, which nothing else asks for; scoring walks as far, or ZeRO-3 would trace anew.
    module.get_input_embeddings().register_forward_hook(require_grad)

    def frozen() -> None:
        for batch, _ in scorer.calibration.batches():
            context.loss(module, batch).backward()
            context.engine.after_plain_backward()

    frozen()  # warm-up: allocators, ZeRO-3's trace
    for _ in range(rounds):
        clock.time(FROZEN, frozen)
        scores = clock.time("salience", partial(score, scorer))
        choice = partial(select, scores, context.shapes, context.num_trainable, recipe.mask.budget)
        mask = clock.time("selection", choice)
    num_tokens = sum(len(row.ids) for row in scorer.calibration.rows)
    result = {
        "machine": machine_facts(),
        "rows": clock.rows(),
        "what": f"choosing a mask by {recipe.mask.salience}, medians of {rounds} rounds",
        "recipe": recipe.model_dump(mode="json"),
        "num_tokens": num_tokens,
        "num_trainable": mask.num_trainable,
        "rounds_s": clock.rounds,
        "versions": versions(),
    }
    batch, dtype = recipe.mask.calibration_batch, recipe.model.dtype
    how = f"{len(scorer.calibration.rows)} rows, {num_tokens:,} tokens in batches of {batch}, {dtype}"
    return result, f"{how}, {collectives.world_size()} rank(s)"


def main() -> None:
    arguments = parse_arguments()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    overrides = [*(QUICK if arguments.quick else []), *arguments.overrides]
    use_all_cores()
    from markdown import print_table

    from speft_ds.comm import collectives
    from speft_ds.io import write_json
    from speft_ds.model.dtype import agree_on_dtype
    from speft_ds.training.run_data import load_data
    from speft_ds.training.setup import load_context

    recipe = checked_recipe("score", arguments.recipe, overrides, 1)
    collectives.init()
    recipe = agree_on_dtype(recipe)
    context = load_context(recipe, load_data(recipe, needs_calibration=True), trains=False)
    result, how = measure(context, recipe, rounds)

    def report() -> None:
        print(f"\n{result['what']}: {how}\n")
        shown = [[row["what"], f"{row['seconds']:.2f}", f"{row['over_floor']:.3f}"] for row in result["rows"]]
        print_table(["", "s", "ratio"], shown)
        write_json(arguments.json, result)
        print(f"\n{arguments.json}")

    collectives.run_on_rank0(report)
    collectives.barrier()


if __name__ == "__main__":
    main()
