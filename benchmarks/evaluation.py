"""Scoring on two ranks against stock lm-eval: the same documents, the same answers, seconds per document.

    python benchmarks/evaluation.py --model PATH --data-dir HUB [--tasks A,B] [--limit 100] [--shots 0]

Ours is `deepspeed --num_gpus 2 launch/evaluate.py`; stock is two processes of lm-eval's HFLM at the same
time, each with half of the documents of every task. All have one thread a process, the same batch size and
dtype, no network, and data sets from local copies. Seconds are those of the scoring itself (tasks are built,
prompts made, requests answered, metrics computed), without loading the model; a stock pair takes as long as
its slower half. `same` counts documents whose answer is the same: the choice, or the text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from markdown import print_table  # noqa: E402

from speft_ds.env import machine_facts  # noqa: E402
from speft_ds.io import write_json  # noqa: E402

TASKS = "arc_easy,hellaswag,mmlu_abstract_algebra,mmlu_philosophy,gsm8k"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--data-dir", required=True, help="local copies of data sets, by hub id")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=100, help="documents per task; even")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default="auto", help="of ours: auto, gathered or sharded")
    parser.add_argument("--half", type=int, help=argparse.SUPPRESS)  # this process is a stock one
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "evaluation.json")
    return parser.parse_args()


def stock(arguments: argparse.Namespace) -> None:
    """One stock process: its half of the documents of each task, a task at a time; writes what it found."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from speft_ds.evaluation.tasks import local_data

    torch.set_num_threads(1)
    model = HFLM(arguments.model, dtype=arguments.dtype, device="cpu", batch_size=arguments.batch_size)
    manager, found = TaskManager(), {}
    for task in arguments.tasks.split(","):
        start = time.perf_counter()
        with local_data(arguments.data_dir):
            results = simple_evaluate(
                model,
                tasks=[task],
                num_fewshot=arguments.shots,
                samples={task: list(range(arguments.half, arguments.limit, 2))},
                task_manager=manager,
                apply_chat_template=True,
            )
        rows = [[key(row), answer(row)] for row in results["samples"][task]]
        found[task] = {"seconds": time.perf_counter() - start, "answers": rows}
    write_json(arguments.output, found)


def key(row: dict) -> str:
    """A task with several filters of its answers has a row for each."""
    return f"{row['doc_id']} {row['filter']}"


def answer(row: dict) -> str | int:
    """What a model said to a document: the number of the likeliest choice, or its text."""
    said = row["filtered_resps"]
    if isinstance(said[0], str):
        return said[0]
    likelihoods = [float(each[0]) for each in said]
    return likelihoods.index(max(likelihoods))


def environment() -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **own}


def run_stock(arguments: argparse.Namespace, folder: Path) -> dict:
    """Task -> seconds of the slower half, and answers by document."""
    outputs = [folder / f"half-{half}.json" for half in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--half", str(half), "--output", output], env=environment()
        )
        for half, output in enumerate(outputs)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit("a stock process failed")
    halves = [json.loads(output.read_text()) for output in outputs]
    return {
        task: {
            "seconds": max(half[task]["seconds"] for half in halves),
            "answers": dict(row for half in halves for row in half[task]["answers"]),
        }
        for task in halves[0]
    }


def run_ours(arguments: argparse.Namespace, folder: Path) -> dict:
    """The same of ours, a launch a task."""
    launcher, found = Path(sys.executable).with_name("deepspeed"), {}
    for task in arguments.tasks.split(","):
        output = folder / task
        command = [launcher, "--num_gpus", "2", ROOT / "launch" / "evaluate.py", "--model", arguments.model]
        command += ["--tasks", task, "--limit", str(arguments.limit), "--num-fewshot", str(arguments.shots)]
        command += [f"eval.data_dir={arguments.data_dir}", f"eval.batch_size={arguments.batch_size}"]
        command += [f"model.dtype={arguments.dtype}", f"eval.mode={arguments.mode}", f"output_dir={output}"]
        own = {"SPEFT_DS_CACHE": str(folder / "cache")}  # nothing is answered from an earlier run
        subprocess.run(command, env={**environment(), **own}, check=True, stdout=subprocess.DEVNULL)
        (path,) = (output / "eval").glob("*.json")
        document = json.loads(path.read_text())
        lines = (path.with_suffix("") / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        found[task] = {
            "seconds": document["seconds"],
            "mode": document["settings"]["mode"],
            "documents": [row["doc_id"] for row in rows if row["filter"] == rows[0]["filter"]],
            "answers": {key(row): answer(row) for row in rows},
            "score": next(row["value"] for row in document["scores"] if row["is_main"]),
        }
    return found


def main() -> None:
    arguments = parse_arguments()
    if arguments.half is not None:
        stock(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = run_stock(arguments, Path(folder)), run_ours(arguments, Path(folder))
    rows = []
    for task, own in ours.items():
        num = len(own["documents"])
        same = sum(own["answers"][each] == theirs[task]["answers"][each] for each in own["answers"])
        each = num // 2  # documents per rank
        rows.append(
            {
                "task": task,
                "mode": own["mode"],
                "documents": num,
                "each once": sorted(own["documents"]) == list(range(arguments.limit)),
                "same": f"{same} of {len(own['answers'])}",
                "score": own["score"],
                "stock s/100 per rank": 100 * theirs[task]["seconds"] / each,
                "ours s/100 per rank": 100 * own["seconds"] / each,
                "ratio": own["seconds"] / theirs[task]["seconds"],
            }
        )
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print_table(list(rows[0]), shown)
    write_json(arguments.json, {"machine": machine_facts(), "rows": rows})


if __name__ == "__main__":
    main()
