"""What confining the entries to few columns costs: held-out loss and accuracy at equal numbers of entries.

    python benchmarks/quality_columns.py --data DIR [--seeds 1 2 3] [--jobs 2] [--table]

DIR has `sst2/` (train.jsonl, validation.jsonl: sentence, label) and `alpaca_5k/` (train.jsonl,
heldout.jsonl: instruction, input, output). Each data set is trained with entries anywhere and with
`mask.compute` 0.1 and 0.05, once per seed. How runs are made and continued: quality.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import quality
import yaml
from quality import Comparison, Run

from speft_ds.io import write_text

FREE = "anywhere"
CONFINED = {"0.1": {"mask": {"compute": 0.1}}, "0.05": {"mask": {"compute": 0.05}}}
SST2_TASK = "sst2_words"


def scored_sst2_sections(arguments: argparse.Namespace) -> dict:
    """SST-2, and its accuracy by an lm-eval task of `task_text`."""
    sections = quality.sst2_sections(arguments)
    sections["eval"] |= {
        "tasks": [SST2_TASK],
        "include_path": str(arguments.output / "tasks"),
        "chat_template": False,
        "before": False,
    }
    return sections


def alpaca_sections(arguments: argparse.Namespace) -> dict:
    return {
        "data": {
            "path": str(arguments.data / "alpaca_5k" / "train.jsonl"),
            "format": "alpaca",
            "max_length": 256,
            "packing": True,
            "empty_rows": "drop",
        },
        "mask": {"calibration_samples": 32, "calibration_batch": 4},
        "train": {"steps": 80, "global_batch": 4, "micro_batch": 4},  # packs: about 9 rows
        "eval": {
            "validation": str(arguments.data / "alpaca_5k" / "heldout.jsonl"),
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
            "doc_to_text": quality.SST2_PROMPT.replace("{sentence}", "{{sentence}}"),
            "doc_to_choice": quality.SST2_LABELS,
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        sort_keys=False,
    )


def add_shared(results: list[dict], output: Path) -> None:
    """Add `shared` to every confined run: the fraction of its entries that its seed's free mask has, too."""
    by_run = {Run(result["data_set"], result["variant"], result["seed"]): result for result in results}
    for run, result in by_run.items():
        free = Run(run.data_set, FREE, run.seed)
        if run.variant in CONFINED and free in by_run:
            result["shared"] = share_in(entries_of(output / run.name), entries_of(output / free.name))


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


def mean_share(key: str, runs: list[dict]) -> str:
    found = [run[key] for run in runs if key in run]
    return f"{mean(found):.1%}" if found else ""


COMPARISON = Comparison(
    name="quality_columns",
    files=(*quality.SST2_FILES, "alpaca_5k/train.jsonl", "alpaca_5k/heldout.jsonl"),
    data_sets={"sst2": scored_sst2_sections, "alpaca": alpaca_sections},
    label="entries in",
    variants={FREE: {}, **CONFINED},
    untouched={"untouched": {}},
    reference=FREE,
    columns={
        "multiply-adds": lambda runs: mean_share("compute", runs),
        "entries": lambda runs: " or ".join(f"{n:,}" for n in sorted({run["num_trainable"] for run in runs})),
        "of these anywhere's": lambda runs: mean_share("shared", runs),
    },
)


def main() -> None:
    arguments = quality.parse_arguments(COMPARISON, __doc__)
    validation = arguments.data / "sst2" / "validation.jsonl"
    write_text(arguments.output / "tasks" / f"{SST2_TASK}.yaml", task_text(validation))
    is_complete = quality.train_all(COMPARISON, arguments)
    results = quality.results_of(COMPARISON, arguments)
    add_shared(results, arguments.output)
    quality.print_report(COMPARISON, arguments, results)
    sys.exit(not is_complete)


if __name__ == "__main__":
    main()
