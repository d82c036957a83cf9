"""What a model loses in each format of few bits: perplexity of a text, and answers to a task.

    python benchmarks/formats.py --text TEST.jsonl --data-dir HUB [--model PATH] [--activations FORMAT]

A row per format, its weights encoded and decoded once, by `launch/evaluate.py --weights FORMAT`; the first
row is the untouched model. `same answers`: documents to which it gives the answer of the untouched model,
which says more than two accuracies with their errors. Answers are kept in the cache folder, so it can be
stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer  # noqa: E402
from markdown import print_table  # noqa: E402
from models import add_model_arguments, find_model  # noqa: E402

from speft_ds.cli.start_ranks import visible_gpus  # noqa: E402
from speft_ds.config.values import BASE_FORMATS  # noqa: E402
from speft_ds.env import free_port, machine_facts  # noqa: E402
from speft_ds.evaluation.perplexity import read_text  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.model.codecs import CODECS  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, help="a text, or .jsonl rows with `text`")
    parser.add_argument("--bytes", type=int, default=10**9, help="of the text, from its beginning")
    parser.add_argument("--as-written", action="store_true", help="keep WikiText's ` @-@ ` and ` , `")
    parser.add_argument("--data-dir", help="local copies of the tasks' data sets, by hub id")
    parser.add_argument("--include-path", help="a folder of task files of your own")
    parser.add_argument("--tasks", default="arc_easy", help="of choices; empty: none")
    parser.add_argument("--limit", type=int, default=500, help="documents per task")
    parser.add_argument("--formats", default=",".join(BASE_FORMATS), help="of the weights")
    parser.add_argument("--activations", help="the format of the linears' inputs, in every row but the first")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32", help="to compute in")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one format, a little of everything")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "formats.json")
    return parser.parse_args()


def score(command: list, folder: Path) -> dict:
    """The score file of a command for the launcher, and the answers to its documents."""
    gpu_less = {} if visible_gpus() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **gpu_less}
    launcher = [Path(sys.executable).with_name("deepspeed"), "--master_port", str(free_port())]
    command = [*launcher, *command, f"output_dir={folder}"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (path,) = (folder / "eval").glob("*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    document["answers"] = {}
    for rows in path.with_suffix("").glob("*.jsonl"):
        with rows.open(encoding="utf-8") as file:
            answers = {f"{rows.stem} {row['doc_id']}": choice(row) for row in map(json.loads, file)}
        document["answers"] |= answers
    return document


def evaluate(arguments: argparse.Namespace, model: str, text: Path | None) -> list:
    """The command that scores the model as it is."""
    command = ["--num_gpus", str(arguments.ranks), ROOT / "launch" / "evaluate.py"]
    command += ["--model", model, f"model.dtype={arguments.dtype}", "eval.chat_template=false"]
    if arguments.tasks:
        command += ["--tasks", arguments.tasks, "--limit", str(arguments.limit)]
    if text is not None:
        command += ["--text", text, f"eval.forgetting_bytes={text.stat().st_size}"]
    for key, path in (("data_dir", arguments.data_dir), ("include_path", arguments.include_path)):
        command += [f"eval.{key}={path}"] if path else []
    return command


def in_format(arguments: argparse.Namespace, name: str | None) -> list[str]:
    """The flags for a format of the weights; None: the model as it is."""
    if name is None:
        return []
    return ["--weights", name, *(["--activations", arguments.activations] if arguments.activations else [])]


def choice(row: dict) -> int:
    """The number of the likeliest answer."""
    likelihoods = [float(each[0]) for each in row["filtered_resps"]]
    return likelihoods.index(max(likelihoods))


def row_of(name: str | None, dtype: str, document: dict, untouched: dict) -> dict[str, str]:
    """A line of the table; `dtype` of the checkpoint."""
    bits = CODECS[name].bits_per_weight if name else 8 * getattr(torch, dtype).itemsize
    row = {"weights": name or f"{dtype}, as they are", "bits per weight": f"{bits:g}"}
    if document["perplexity"]:
        now, before = (each["perplexity"]["token_perplexity"] for each in (document, untouched))
        row |= {"perplexity": f"{now:.2f}", "change": f"{now / before - 1:+.1%}"}
    for each in document["scores"]:
        if each["metric"] in ("acc", "acc_norm"):
            row[f"{each['task']} {each['metric']}"] = f"{each['value']:.3f} ± {each['stderr']:.3f}"
    if document["answers"]:
        same = sum(document["answers"][key] == answer for key, answer in untouched["answers"].items())
        row["same answers"] = f"{same} of {len(document['answers'])}"
    return row


def main() -> None:
    arguments = parse_arguments()
    formats = arguments.formats.split(",")
    if arguments.quick:
        formats, arguments.limit, arguments.bytes = formats[:1], 4, 2000
    with tempfile.TemporaryDirectory() as work:
        model, _ = find_model(arguments, Path(work))
        text = None
        if arguments.text:
            written, text = read_text(arguments.text, arguments.bytes), Path(work) / "text.txt"
            text.write_text(written if arguments.as_written else wikitext_detokenizer({"page": written}))
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        command, rows, untouched = evaluate(arguments, model, text), [], None
        for name in (None, *formats):
            folder = Path(work) / (name or "untouched")
            document = score([*command, *in_format(arguments, name)], folder)
            untouched = untouched or document
            rows.append(row_of(name, dtype, document, untouched))
            print(*rows[-1].values(), sep=", ", file=sys.stderr, flush=True)
            tokens = document["perplexity"] and document["perplexity"]["num_tokens"]
            how = {
                "dtype": arguments.dtype,
                "activations": arguments.activations,
                "tokens": tokens,
                "notes": document["notes"],
            }
            write_json(arguments.json, {"machine": machine_facts(), **how, "rows": rows})
    print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
