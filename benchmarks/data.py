"""How long rows take to be ready: read, tokenised and packed; and again, from the cache.

    python benchmarks/data.py [--rows 50000] [--recipe quickstart] [key.sub=value ...]

The rows are made up, of the lengths that instruction data has; the tokenizer is the recipe's. Each start
is a process of its own, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TEXT = (
    "the a of to and in model data answer question explain write list number water light city river "
    "because however small large first second result example between three"
)
PREPARE = """
import json, sys, time
start = time.perf_counter()
from speft_ds.data.dataset import prepare
from speft_ds.data.dataset import request_of
from speft_ds.config.load_recipe import load_recipe
from speft_ds.data.tokenize import load_tokenizer
recipe = load_recipe(sys.argv[1], sys.argv[2:])
corpus = prepare(request_of(recipe), lambda: load_tokenizer(recipe.model.name_or_path), lambda text: None)
seconds, tokens = time.perf_counter() - start, int(corpus.lengths.sum())
packs = len(corpus)
facts = {"s": seconds, "rows": corpus.num_rows, "tokens": tokens, "packs": packs}
json.dump({**facts, "filled": tokens / (packs * recipe.data.max_length)}, sys.stdout)
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "data.json")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args()


def write_rows(path: Path, num_rows: int) -> None:
    """Alpaca-like rows: an instruction, every third with an input, responses of 1 to 200 words."""
    rng, words = random.Random(0), TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            sizes = (rng.randint(5, 20), rng.choice([0, 0, rng.randint(3, 60)]), rng.randint(1, 200))
            texts = (" ".join(rng.choices(words, k=size)) for size in sizes)
            row = dict(zip(("instruction", "input", "output"), texts, strict=True))
            row["instruction"] += f" {number}"
            file.write(json.dumps(row) + "\n")


def main() -> None:
    arguments = parse_arguments()
    from markdown import print_table

    from speft_ds.env import machine_facts, versions
    from speft_ds.io import write_json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        ours = [f"data.path={path}", "data.format=alpaca", "data.packing=true", "data.max_length=512"]
        command = [sys.executable, "-c", PREPARE, arguments.recipe, *ours, *arguments.overrides]
        env = {**os.environ, "SPEFT_DS_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        starts, walls = [], []
        for _ in range(2):
            start = time.perf_counter()
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            walls.append(time.perf_counter() - start)
            starts.append(json.loads(done.stdout))
    first = starts[0]
    print(
        f"\n{first['rows']:,} rows, {first['tokens']:,} tokens in {first['packs']:,} packs of 512, "
        f"{first['filled']:.1%} filled; {os.cpu_count()} cores\n"
    )
    rows = [
        [name, f"{start['s']:.2f}", f"{wall:.2f}", f"{start['tokens'] / start['s']:,.0f}"]
        for name, start, wall in zip(("first start", "second start"), starts, walls, strict=True)
    ]
    print_table(["", "s", "s of the process", "tokens/s"], rows)
    result = {"what": "rows ready to train on", "starts": starts, "seconds_of_process": walls}
    write_json(arguments.output, {**result, "versions": versions(), "machine": machine_facts()})
    print(f"\n{arguments.output}")


if __name__ == "__main__":
    main()
