"""Every salience metric on one recipe: seconds, mask hash, overlap. One `speft score` each.

    python benchmarks/salience.py [--recipe NAME] [--ranks 2] [--ranks 1 ...] [--metrics a,b] [key=value ...]

Given several numbers of ranks, the table compares the masks that they choose. Each metric is scored by the
command that a user types; `grasp` in float32, which it needs, the others as the recipe says.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from markdown import print_table  # noqa: E402

from speft_ds.config.mask_config import MASK_FILE, MaskConfig  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.sparse.mask import jaccard, read_mask  # noqa: E402

METRICS = get_args(MaskConfig.model_fields["salience"].annotation)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated; default: 2")
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "salience")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args()


def score(arguments: argparse.Namespace, metric: str, ranks: int) -> dict:
    """Run `speft score`; the contents of its score.json, and its folder."""
    folder = arguments.output / f"{metric}-{ranks}"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*arguments.overrides, f"mask.salience={metric}", f"output_dir={folder}"]
    if metric == "grasp":
        overrides.append("model.dtype=float32")
    command = [
        sys.executable,
        "-m",
        "speft_ds.cli",
        "score",
        arguments.recipe,
        "--ranks",
        str(ranks),
        *overrides,
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{metric} on {ranks} rank(s) failed:\n{finished.stdout}\n{finished.stderr}")
    return {**json.loads((folder / "score.json").read_text(encoding="utf-8")), "folder": str(folder)}


def main() -> None:
    arguments = parse_arguments()
    world_sizes, rows, results = arguments.ranks or [2], [], []
    for metric in arguments.metrics.split(","):
        first = None
        for ranks in world_sizes:
            result = score(arguments, metric, ranks)
            mask, _ = read_mask(Path(result["folder"]) / MASK_FILE)
            first = first or mask
            same = jaccard(first, mask)
            seconds = result["timings_s"]
            rows.append(
                [
                    metric,
                    str(ranks),
                    f"{seconds['salience']:.2f}",
                    f"{seconds['selection']:.2f}",
                    f"{result['peak_memory_gib']:.2f}",
                    f"{mask.num_trainable:,}",
                    mask.sha256[:12],
                    f"{same:.6f}",
                    result["fingerprint"][:12],
                ]
            )
            print(rows[-1], flush=True)
            results.append({**result, "ranks": ranks, "jaccard_with_first": same})
    header = [
        "metric",
        "ranks",
        "salience s",
        "selection s",
        "GiB",
        "entries",
        "mask",
        "same as first",
        "base after",
    ]
    print()
    print_table(header, rows)
    write_json(arguments.output / "salience.json", {"results": results})


if __name__ == "__main__":
    main()
