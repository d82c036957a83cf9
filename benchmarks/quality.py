"""Comparisons of quality: variants of a recipe, trained once per seed, compared seed by seed.

`quality_columns.py` and `quality_formats.py` name the variants. Every run is a `speft train` on one rank, in
a folder of its own below --output. The seed draws the order of the rows and those that the mask is scored on.
A finished run is not repeated, others go on from their checkpoints: start it again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from markdown import print_table  # noqa: E402

from speft_ds.io import read_json, write_json, write_text  # noqa: E402
from speft_ds.study.statistics import estimate, paired_difference  # noqa: E402
from speft_ds.tools.quickstart import NAME, default_cache_dir  # noqa: E402
from speft_ds.training.run_dir import METRICS, RECIPE, read_facts  # noqa: E402

LOSS, ACCURACY = "held-out loss", "accuracy"
# No white space at the end of the prompt: lm-eval would take it for a part of the answers, training does not.
SST2_PROMPT, SST2_LABELS = "Review: {sentence}\nSentiment:", ["negative", "positive"]
SST2_FILES = ("sst2/train.jsonl", "sst2/validation.jsonl")
COMMON = {
    "model": {"dtype": "auto"},
    "mask": {"salience": "gradient", "density": 0.005, "budget": "global"},
    "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 5},
    "deepspeed": {"config": "zero3_cpu"},
}
# One step that is too small to change a weight.
NO_TRAINING = {"optimizer": {"lr": 1e-30, "warmup_steps": 0}, "train": {"steps": 1}}


@dataclass(frozen=True)
class Run:
    """One run: a data set, a variant's name, a seed."""

    data_set: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join((self.data_set, self.variant.replace(" ", "_"), str(self.seed)))


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        name: of the script, of its folder and its JSON.
        files: what --data must have.
        data_sets: name -> its sections of a recipe, given the arguments.
        label: what the variants are, as the table's heading.
        variants: name -> the sections in which it differs.
        untouched: the same of models that are not trained, once each.
        reference: the variant that the others are compared with.
        columns: more headings -> their text for the results of a row.
    """

    name: str
    files: tuple[str, ...]
    data_sets: dict[str, Callable[[argparse.Namespace], dict]]
    label: str
    variants: dict[str, dict]
    untouched: dict[str, dict]
    reference: str
    columns: dict[str, Callable[[list[dict]], str]] = field(default_factory=dict)

    def runs(self, seeds: list[int]) -> list[Run]:
        """All runs, a seed after the other, so that a part can be compared; the untouched models last."""
        runs = [Run(data, name, seed) for seed in seeds for name in self.variants for data in self.data_sets]
        return runs + [Run(data, name, seeds[0]) for name in self.untouched for data in self.data_sets]


def parse_arguments(comparison: Comparison, text: str, words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help=f"a folder with {', '.join(comparison.files)}"
    )
    parser.add_argument("--model", default=str(default_cache_dir() / NAME), help="default: the quickstart's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed: whether it works")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / comparison.name)
    parser.add_argument("--json", type=Path, help=f"default: {comparison.name}.json in --output")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.seeds, arguments.output = arguments.seeds[:1], arguments.output / "quick"
    arguments.data, arguments.output = arguments.data.resolve(), arguments.output.resolve()
    if missing := [name for name in comparison.files if not (arguments.data / name).is_file()]:
        parser.error(f"--data {arguments.data} lacks {', '.join(missing)}")
    return arguments


def sst2_sections(arguments: argparse.Namespace) -> dict:
    """To learn the labels of SST-2 as text: the loss is that of label and end token."""
    return {
        "data": {
            "path": str(arguments.data / "sst2" / "train.jsonl"),
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
            "validation": str(arguments.data / "sst2" / "validation.jsonl"),
            "every": 1000,  # only at the end
            "batch_size": 32,
        },
    }


def recipe_of(run: Run, comparison: Comparison, arguments: argparse.Namespace) -> dict:
    """The recipe of a run, as a file has it."""
    parts = [COMMON, comparison.data_sets[run.data_set](arguments)]
    parts += [(comparison.variants | comparison.untouched)[run.variant]]
    parts += [{"train": {"steps": 10}}] if arguments.quick else []
    parts += [NO_TRAINING] if run.variant in comparison.untouched else []
    recipe = {"seed": run.seed, "output_dir": str(arguments.output / run.name)}
    for part in [{"model": {"name_or_path": arguments.model}}, *parts]:
        for section, values in part.items():
            recipe[section] = {**recipe.get(section, {}), **values}
    return recipe


def is_finished(folder: Path) -> bool:
    return read_facts(folder).get("finished") is True


def write_recipe(run: Run, comparison: Comparison, arguments: argparse.Namespace) -> Path:
    """The recipe's file; ends the program where the run was made with another one."""
    path = arguments.output / "recipes" / f"{run.name}.yaml"
    text = yaml.safe_dump(recipe_of(run, comparison, arguments), sort_keys=False)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} was written with other settings: choose another --output, or remove the old one")
    write_text(path, text)
    return path


def train(run: Run, output: Path) -> int:
    """Start or continue a run that is not finished; the exit code of `speft train`. Its log is beside it."""
    if is_finished(output / run.name):
        return 0
    recipe = output / "recipes" / f"{run.name}.yaml"
    command = [sys.executable, "-m", "speft_ds.cli.main", "train", str(recipe), "--ranks", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"{run.name} ...\n", end="", flush=True)  # in one piece: another thread prints, too
    with open(output / f"{run.name}.log", "ab") as log:
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


def train_all(comparison: Comparison, arguments: argparse.Namespace) -> bool:
    """Train what is not finished, --jobs at a time; whether all of it succeeded. With --table: nothing."""
    if arguments.table:
        return True
    runs = comparison.runs(arguments.seeds)
    for run in runs:
        write_recipe(run, comparison, arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return not any(list(pool.map(lambda run: train(run, arguments.output), runs)))


def result_of(run: Run, output: Path) -> dict | None:
    """What a run came to; None where it is not finished."""
    folder = output / run.name
    if not is_finished(folder):
        return None
    facts = read_facts(folder)
    last = json.loads((folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    result = {
        "data_set": run.data_set,
        "variant": run.variant,
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


def results_of(comparison: Comparison, arguments: argparse.Namespace) -> list[dict]:
    """Of all finished runs."""
    results = (result_of(run, arguments.output) for run in comparison.runs(arguments.seeds))
    return [result for result in results if result is not None]


def summary(comparison: Comparison, results: list[dict]) -> list[dict]:
    """A row per data set, measure and variant: see `compared`; those without a finished run are left out."""
    rows = []
    for data_set in comparison.data_sets:
        for measure in (ACCURACY, LOSS):
            found = [result for result in results if result["data_set"] == data_set and measure in result]
            reference = {r["seed"]: r[measure] for r in found if r["variant"] == comparison.reference}
            for variant in (*comparison.untouched, *comparison.variants):
                runs = [result for result in found if result["variant"] == variant]
                is_compared = variant in comparison.variants and variant != comparison.reference
                name = {"data_set": data_set, "measure": measure, "variant": variant, "runs": runs}
                values = {run["seed"]: run[measure] for run in runs}
                rows += [name | compared(values, reference if is_compared else {})] if runs else []
    return rows


def compared(values: dict[int, float], reference: dict[int, float]) -> dict:
    """The mean of values by seed, and of their differences to the reference's, with errors."""
    seeds = sorted(values)
    own, change = estimate(list(values.values())), paired_difference(values, reference)
    return {
        "seeds": seeds,
        "values": [values[seed] for seed in seeds],
        "mean": own.mean,
        "stderr": own.error,
        "differences": [values[seed] - reference[seed] for seed in seeds if seed in reference],
        "difference": change and change.mean,
        "difference_stderr": change and change.error,
    }


def table_row(comparison: Comparison, row: dict) -> list[str]:
    """A row of the summary as text: accuracies in percent, their differences in points."""
    is_share = row["measure"] == ACCURACY
    scale, digits = (100, 2) if is_share else (1, 4)

    def shown(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        text = f"{scale * value:{sign}.{digits}f}"
        return text if error is None else f"{text} ± {scale * error:.{digits}f}"

    is_trained = row["variant"] in comparison.variants
    return [
        row["data_set"],
        row["measure"] + (", %" if is_share else ""),
        row["variant"],
        str(len(row["seeds"])) if is_trained else "",
        shown(row["mean"], row["stderr"]),
        shown(row["difference"], row["difference_stderr"], "+"),
        " ".join(f"{scale * difference:+.{digits}f}" for difference in row["differences"]),
        *(text(row["runs"]) if is_trained else "" for text in comparison.columns.values()),
    ]


def print_report(comparison: Comparison, arguments: argparse.Namespace, results: list[dict]) -> None:
    """The table of the finished runs, and the JSON with each of them."""
    rows = summary(comparison, results)
    header = ["data", "measure", comparison.label, "seeds", "mean", f"to {comparison.reference}", "by seed"]
    print_table([*header, *comparison.columns], [table_row(comparison, row) for row in rows])
    print(f"\n{len(results)} of {len(comparison.runs(arguments.seeds))} runs are finished")
    rows = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
    write_json(
        arguments.json or arguments.output / f"{comparison.name}.json", {"runs": results, "rows": rows}
    )
