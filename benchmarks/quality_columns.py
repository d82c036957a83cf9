"""What confining the entries to few columns costs: held-out loss and accuracy at equal numbers of entries.

    python benchmarks/quality_columns.py --data DIR [--seeds 1 2 3] [--at-once 2] [--table]

DIR has `sst2/` (train.jsonl, validation.jsonl: sentence, label) and `alpaca_5k/` (train.jsonl,
heldout.jsonl: instruction, input, output). Every run is a `speft train` on one rank, in a folder of its own:
each data set with entries anywhere and with `mask.compute` 0.1 and 0.05, once per seed. The seed draws the
order of the rows and those that the mask is scored on; masks are compared seed by seed. A finished run is not
repeated, others go on from their checkpoints: start it again after an interruption. `--table` starts none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from markdown import print_table  # noqa: E402

from speft_ds.io import read_json, write_json, write_text  # noqa: E402
from speft_ds.tools.quickstart import NAME, default_cache_dir  # noqa: E402
from speft_ds.training.run_dir import METRICS, RECIPE, read_facts  # noqa: E402

FREE = "anywhere"
MASKS = {FREE: None, "0.1": 0.1, "0.05": 0.05}  # name -> mask.compute
UNTOUCHED = "untouched"  # the model as it is: one step that is too small to change a weight
DATA_SETS = ("sst2", "alpaca")
FILES = ("sst2/train.jsonl", "sst2/validation.jsonl", "alpaca_5k/train.jsonl", "alpaca_5k/heldout.jsonl")
LOSS, ACCURACY = "held-out loss", "accuracy"
# No white space at the end of the prompt: lm-eval would take it for a part of the answers, training does not.
SST2_PROMPT, SST2_LABELS = "Review: {sentence}\nSentiment:", ["negative", "positive"]
SST2_TASK = "sst2_words"


@dataclass(frozen=True)
class Run:
    """One run: a data set, the name of a mask (or UNTOUCHED), a seed."""

    data_set: str
    mask: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data_set}-{self.mask}-{self.seed}"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with sst2/ and alpaca_5k/")
    parser.add_argument("--model", default=str(default_cache_dir() / NAME), help="default: the quickstart's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed: whether it works")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "quality_columns")
    parser.add_argument("--json", type=Path, help="default: quality_columns.json in --output")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.seeds, arguments.output = arguments.seeds[:1], arguments.output / "quick"
    arguments.output = arguments.output.resolve()
    if missing := [name for name in FILES if not (arguments.data / name).is_file()]:
        parser.error(f"--data {arguments.data} lacks {', '.join(missing)}")
    return arguments


def runs_of(seeds: list[int]) -> list[Run]:
    """All runs, a seed after the other, so that a part of them can be compared; last the untouched model."""
    runs = [Run(data, mask, seed) for seed in seeds for mask in MASKS for data in DATA_SETS]
    return runs + [Run(data, UNTOUCHED, seeds[0]) for data in DATA_SETS]


def recipe_of(run: Run, arguments: argparse.Namespace) -> dict:
    """The recipe of a run, as a file has it."""
    task_folder = arguments.output / "tasks"
    of_data = sst2_sections if run.data_set == "sst2" else alpaca_sections
    recipe = {
        "model": {"name_or_path": arguments.model, "dtype": "auto"},
        "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 5},
        "deepspeed": {"config": "zero3_cpu"},
        "seed": run.seed,
        "output_dir": str(arguments.output / run.name),
        **of_data(arguments.data.resolve(), task_folder),
    }
    recipe["mask"] |= {"salience": "gradient", "density": 0.005, "budget": "global"}
    recipe["mask"] |= {"compute": MASKS.get(run.mask)}
    if arguments.quick:
        recipe["train"]["steps"] = 10
    if run.mask == UNTOUCHED:
        recipe["optimizer"] |= {"lr": 1e-30, "warmup_steps": 0}
        recipe["train"]["steps"] = 1
    return recipe


def sst2_sections(data: Path, task_folder: Path) -> dict:
    validation = str(data / "sst2" / "validation.jsonl")
    return {
        "data": {
            "path": str(data / "sst2" / "train.jsonl"),
            "format": "classification",
            "columns": {"text": "sentence", "label": "label"},
            "labels": SST2_LABELS,
            "template": SST2_PROMPT,
            "chat_template": False,
            "max_length": 128,
            "packing": True,  # half of the time: the rows are short
        },
        "mask": {"calibration_samples": 64, "calibration_batch": 16},
        "train": {"steps": 100, "global_batch": 3, "micro_batch": 3},  # packs: about 18 rows
        "eval": {
            "validation": validation,
            "every": 1000,  # only at the end
            "tasks": [SST2_TASK],
            "include_path": str(task_folder),
            "chat_template": False,
            "batch_size": 32,
            "before": False,
        },
    }


def alpaca_sections(data: Path, task_folder: Path) -> dict:
    return {
        "data": {
            "path": str(data / "alpaca_5k" / "train.jsonl"),
            "format": "alpaca",
            "max_length": 256,
            "packing": True,
            "empty_rows": "drop",
        },
        "mask": {"calibration_samples": 32, "calibration_batch": 4},
        "train": {"steps": 80, "global_batch": 4, "micro_batch": 4},  # packs: about 9 rows
        "eval": {
            "validation": str(data / "alpaca_5k" / "heldout.jsonl"),
            "every": 1000,
            "batch_size": 8,
        },
    }


def task_text(validation: Path) -> str:
    """An lm-eval task: which of the two labels is likelier behind the prompt that was trained on."""
    return yaml.safe_dump(
        {
            "task": SST2_TASK,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(validation)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": SST2_PROMPT.replace("{sentence}", "{{sentence}}"),
            "doc_to_choice": SST2_LABELS,
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        sort_keys=False,
    )


def is_finished(folder: Path) -> bool:
    return read_facts(folder).get("finished") is True


def write_recipe(run: Run, arguments: argparse.Namespace) -> Path:
    """The recipe's file; ends the program where the run was made with another one."""
    path = arguments.output / "recipes" / f"{run.name}.yaml"
    text = yaml.safe_dump(recipe_of(run, arguments), sort_keys=False)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} was written with other settings: choose another --output, or remove the old one")
    write_text(path, text)
    return path


def train(run: Run, arguments: argparse.Namespace) -> int:
    """Start or continue a run that is not finished; the exit code of `speft train`. Its log is beside it."""
    folder = arguments.output / run.name
    if is_finished(folder):
        return 0
    recipe = arguments.output / "recipes" / f"{run.name}.yaml"
    command = [sys.executable, "-m", "speft_ds.cli.main", "train", str(recipe), "--ranks", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"{run.name} ...\n", end="", flush=True)  # in one piece: another thread prints, too
    with open(arguments.output / f"{run.name}.log", "ab") as log:
        code = subprocess.run(
            [*command, "--resume", "auto"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    print(f"{run.name}: " + (f"failed, see {log.name}\n" if code else "done\n"), end="", flush=True)
    return code


def result_of(run: Run, output: Path) -> dict | None:
    """What a run came to; None where it is not finished."""
    folder = output / run.name
    if not is_finished(folder):
        return None
    facts = read_facts(folder)
    last = json.loads((folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    result = {
        "data_set": run.data_set,
        "mask": run.mask,
        "seed": run.seed,
        "num_trainable": facts["mask"]["num_trainable"],
        "compute": facts["mask"]["compute"],
        "mask_sha256": facts["mask"]["sha256"],
        "steps": facts["num_steps"],
        "dtype": yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))["model"]["dtype"],
        "machine": facts["machine"],
        LOSS: last["validation_loss"],
    }
    after = folder / "eval" / "after.json"
    if after.is_file():
        (score,) = (score for score in read_json(after)["scores"] if score["is_main"])
        result |= {ACCURACY: score["value"], "num_documents": score["num_documents"]}
    return result


def add_shared(results: list[dict], output: Path) -> None:
    """Add `shared` to every confined run: the fraction of its entries that its seed's free mask has, too."""
    for data_set, seed in sorted({(result["data_set"], result["seed"]) for result in results}):
        of_seed = {r["mask"]: r for r in results if (r["data_set"], r["seed"]) == (data_set, seed)}
        if FREE in of_seed:
            free = entries_of(output / Run(data_set, FREE, seed).name)
            for mask in of_seed.keys() & MASKS.keys() - {FREE}:
                of_seed[mask]["shared"] = share_in(entries_of(output / Run(data_set, mask, seed).name), free)


def entries_of(folder: Path) -> dict:
    """Weight -> sorted flat indices of the entries that a run trained."""
    from speft_ds.adapter.format import open_adapter  # late: imports torch

    adapter = open_adapter(folder / "adapter")
    return {name: adapter.entries(name)[0] for name in adapter.names}


def share_in(own: dict, other: dict) -> float:
    """The fraction of all indices in `own` that `other` has for the same weight."""
    import torch

    common = sum(torch.isin(own[name], other[name]).sum().item() for name in own.keys() & other.keys())
    return common / sum(index.numel() for index in own.values())


def summary(results: list[dict]) -> list[dict]:
    """A row per data set, measure and mask: see `compared`; those without a finished run are left out."""
    rows = []
    for data_set in DATA_SETS:
        for measure in (ACCURACY, LOSS):
            by_mask = {
                mask: {
                    result["seed"]: result
                    for result in results
                    if (result["data_set"], result["mask"]) == (data_set, mask) and measure in result
                }
                for mask in (UNTOUCHED, *MASKS)
            }
            for mask, runs in by_mask.items():
                free = by_mask[FREE] if mask not in (FREE, UNTOUCHED) else {}
                name = {"data_set": data_set, "measure": measure, "mask": mask}
                rows += [{**name, **compared(runs, free, measure)}] if runs else []
    return rows


def compared(runs: dict[int, dict], free: dict[int, dict], measure: str) -> dict:
    """The mean of runs, and of their differences to those of the free mask with the same seed, with errors.

    Args:
        runs, free: seed -> `result_of`.
    """
    seeds = sorted(runs)
    values = [runs[seed][measure] for seed in seeds]
    differences = [runs[seed][measure] - free[seed][measure] for seed in seeds if seed in free]
    shared = [run["shared"] for run in runs.values() if "shared" in run]
    return {
        "seeds": seeds,
        "values": values,
        "mean": mean(values),
        "stderr": standard_error(values),
        "differences": differences,
        "difference": mean(differences) if differences else None,
        "difference_stderr": standard_error(differences),
        "num_trainable": sorted({run["num_trainable"] for run in runs.values()}),
        "compute": mean(run["compute"] for run in runs.values()),
        "shared": mean(shared) if shared else None,
    }


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None of fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table_row(row: dict) -> list[str]:
    """A row of the summary as text: accuracies in percent, their differences in points."""
    is_share = row["measure"] == ACCURACY
    scale, digits = (100, 2) if is_share else (1, 4)

    def shown(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        text = f"{scale * value:{sign}.{digits}f}"
        return text if error is None else f"{text} ± {scale * error:.{digits}f}"

    is_trained = row["mask"] != UNTOUCHED
    return [
        row["data_set"],
        row["measure"] + (", %" if is_share else ""),
        row["mask"],
        str(len(row["seeds"])) if is_trained else "",
        shown(row["mean"], row["stderr"]),
        shown(row["difference"], row["difference_stderr"], "+"),
        " ".join(f"{scale * difference:+.{digits}f}" for difference in row["differences"]),
        f"{row['compute']:.1%}" if is_trained else "",
        " or ".join(f"{number:,}" for number in row["num_trainable"]) if is_trained else "0",
        "" if row["shared"] is None else f"{row['shared']:.1%}",
    ]


HEADER = [
    "data",
    "measure",
    "entries in",
    "seeds",
    "mean",
    "to anywhere",
    "by seed",
    "multiply-adds",
    "entries",
]
HEADER += ["of these anywhere's"]


def main() -> None:
    arguments = parse_arguments()
    runs, codes = runs_of(arguments.seeds), []
    if not arguments.table:
        validation = arguments.data.resolve() / "sst2" / "validation.jsonl"
        write_text(arguments.output / "tasks" / f"{SST2_TASK}.yaml", task_text(validation))
        for run in runs:
            write_recipe(run, arguments)
        with ThreadPoolExecutor(arguments.at_once) as pool:
            codes = list(pool.map(lambda run: train(run, arguments), runs))
    results = [result for run in runs if (result := result_of(run, arguments.output)) is not None]
    add_shared(results, arguments.output)
    rows = summary(results)
    print_table(HEADER, [table_row(row) for row in rows])
    print(f"\n{len(results)} of {len(runs)} runs are finished")
    write_json(arguments.json or arguments.output / "quality_columns.json", {"runs": results, "rows": rows})
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
