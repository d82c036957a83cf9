"""What a plan says one rank holds, and what it takes: Llama-2-13B's width, few layers, CPU ranks.

    python benchmarks/memory.py [--depths 1 2] [--ranks 2] [--tokens 64] [--rows 2] [--deep 40]

Each depth is a random checkpoint, scored and trained by fresh ranks. Memory is what is resident at most in
each phase. Freed blocks are given back to the system at once (MALLOC_MMAP_THRESHOLD_), or the C library would
keep many of them. The last row extrapolates from the first and the last depth, and compares with the plan of
the whole depth. Live weights are kept below a layer, so that what is gathered does not grow with depth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from markdown import print_table  # noqa: E402

from speft_ds.config.recipe import Recipe  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.tools.plan.geometry import GEOMETRIES_DIR  # noqa: E402
from speft_ds.tools.plan.make_plan import make_plan  # noqa: E402
from speft_ds.tools.plan.memory_model import PROCESS  # noqa: E402
from speft_ds.tools.plan.setup import GIB, total  # noqa: E402

MODEL = "meta-llama/Llama-2-13b-hf"
PHASES = ("scoring", "training")
ZERO = {
    "stage": 3,
    "overlap_comm": False,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 200_000_000,
    "stage3_max_reuse_distance": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--deep", type=int, default=40, help="layers to extrapolate to")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of every row")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "memory.json")
    return parser.parse_args()


def config_of(depth: int) -> dict:
    file = GEOMETRIES_DIR / f"{MODEL.replace('/', '--')}.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    return {**config, "num_hidden_layers": depth}


def write_inputs(folder: Path, depth: int, num_tokens: int) -> None:
    """A random checkpoint, rows of equal length and a DeepSpeed configuration."""
    import torch
    from tiny import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_of(depth))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    row = {"prompt": "a", "response": "b" * (num_tokens - 5)}  # four tokens around the prompt, one after
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 32, encoding="utf-8")


def recipe_of(folder: Path, arguments: argparse.Namespace) -> Recipe:
    values = {
        "model": {"name_or_path": str(folder), "dtype": "bfloat16"},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": arguments.tokens},
        "mask": {
            "density": 0.005,
            "calibration_samples": 2 * arguments.ranks * arguments.rows,
            "calibration_batch": arguments.rows,
        },
        "train": {
            "steps": 2,
            "global_batch": arguments.rows * arguments.ranks,
            "micro_batch": arguments.rows,
        },
        "deepspeed": {"config": str(folder / "ds.json")},
        "output_dir": str(folder / "run"),
    }
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": ZERO}), encoding="utf-8")
    return Recipe.model_validate(values)


def measure(folder: Path, depth: int, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Bytes of the rank that took most, and as planned, by phase."""
    from distributed import plan_checks
    from ranks import Ranks

    write_inputs(folder, depth, arguments.tokens)
    recipe = recipe_of(folder, arguments)
    ranks = Ranks(arguments.ranks)
    try:
        by_rank = ranks(plan_checks.check_memory, limit=3600, recipe=recipe)
    finally:
        ranks.stop()
    plan = make_plan(recipe, arguments.ranks, device="cpu")
    shutil.rmtree(folder)
    measured = {phase: max(one[phase] for one in by_rank) for phase in PHASES}
    return measured, {phase: total(plan.memory[phase]) for phase in PHASES}


def extrapolate(results: dict[int, dict], depth: int, phase: str) -> float:
    """Bytes at another depth, on the line through the first and the last measured one."""
    first, last = min(results), max(results)
    slope = (results[last]["measured"][phase] - results[first]["measured"][phase]) / (last - first)
    return results[first]["measured"][phase] + slope * (depth - first)


def plan_whole(folder: Path, arguments: argparse.Namespace) -> dict:
    """What is planned for the whole depth, from a configuration without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(arguments.deep)), encoding="utf-8")
    plan = make_plan(recipe_of(folder, arguments), arguments.ranks, device="cpu")
    return {phase: total(plan.memory[phase]) for phase in PHASES}


def table_row(depth: str, phase: str, measured: float, planned: float) -> list[str]:
    process = PROCESS["cpu"]
    return [
        depth,
        phase,
        f"{measured / GIB:.3f}",
        f"{planned / GIB:.3f}",
        f"{planned / measured - 1:+.1%}",
        f"{(planned - process) / (measured - process) - 1:+.1%}",
    ]


def main() -> None:
    arguments = parse_arguments()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the ranks that are started from here on
    results: dict[int, dict] = {}
    with tempfile.TemporaryDirectory() as work:
        for depth in arguments.depths:
            measured, planned = measure(Path(work) / f"depth{depth}", depth, arguments)
            results[depth] = {"measured": measured, "planned": planned}
            print(f"{depth} layer(s): {results[depth]}", flush=True)
        whole = plan_whole(Path(work) / "whole", arguments)
    rows = [
        table_row(str(depth), phase, result["measured"][phase], result["planned"][phase])
        for depth, result in results.items()
        for phase in PHASES
    ]
    extrapolated = {phase: extrapolate(results, arguments.deep, phase) for phase in PHASES}
    rows += [table_row(f"{arguments.deep}*", phase, extrapolated[phase], whole[phase]) for phase in PHASES]
    header = ["layers", "phase", "measured GiB", "planned GiB", "difference", "without the process"]
    print(
        f"\n{MODEL}'s width, bfloat16, {arguments.ranks} rank(s), {arguments.rows} rows of "
        f"{arguments.tokens} tokens per micro-batch; *: extrapolated\n"
    )
    print_table(header, rows)
    facts = {"extrapolated": extrapolated, "planned": whole, "layers": arguments.deep}
    write_json(arguments.output, {"model": MODEL, "zero": ZERO, "by_depth": results, "whole": facts})
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
