"""All that wants to be known of a GPU, in under ten minutes: `make gpu`.

    python benchmarks/gpu.py [--out FOLDER] [--rehearse]

Runs the tests that need a GPU, the kernels, the loss, a step of Llama-2-7B and the quickstart, each with a
time limit of its own, so that one failure leaves the others' results. Logs, JSON and `summary.md` are in the
folder. It needs no network; the quickstart runs where its model is prepared (`speft quickstart
--prepare-only`). Without a GPU it says so and rehearses: the same parts, at tiny sizes, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from speft_ds.env import cache_folder, machine_facts, versions  # noqa: E402
from speft_ds.io import write_bytes, write_json  # noqa: E402
from speft_ds.tools.quickstart import is_ready  # noqa: E402

TINY = {
    **{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
}
LLAMA = ["--geometry", "meta-llama/Llama-2-7b-hf", "--dtype", "bfloat16", "--rows", "1", "--length", "4096"]


@dataclass(frozen=True)
class Part:
    """A command with its time limit; `why_not`: why it is left out."""

    name: str
    words: list[str]
    limit_s: int
    why_not: str | None = None


def parts(on_gpu: bool, out: Path) -> list[Part]:
    """What to run, in the order in which it is worth most."""

    def script(name: str, *words: str) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "benchmarks" / f"{name}.py"),
            *words,
            "--json",
            str(out / f"{name}.json"),
        ]

    tests = [sys.executable, "-m", "pytest", "-q", "-s", str(ROOT / "tests" / "gpu")]
    if not on_gpu:
        tiny = out / "tiny.json"
        write_json(tiny, TINY)
        step = ["--config", str(tiny), "--rows", "2", "--length", "16", "--rounds", "1", "--compute", "0.3"]
        one = ["--ranks", "1", "--methods", "speft_ds"]
        return [
            Part("tests", [*tests, "--collect-only"], 300),
            Part("kernels", script("kernels", "--tiny", "--rounds", "1"), 300),
            Part("loss", script("loss", "--tiny", "--rounds", "1"), 300),
            Part("step", script("step", *step, *one), 300),
            Part("quickstart", [], 0, "it takes long on a CPU: make quickstart"),
        ]
    missing = (
        None if is_ready(cache_folder()) else "its model is not prepared: speft quickstart --prepare-only"
    )
    speft = str(Path(sys.executable).with_name("speft"))
    quickstart = [speft, "quickstart", f"output_dir={out / 'quickstart'}"]
    methods = ["--ranks", "1", "--compute", "0.1", "0.05", "--methods", "speft_ds", "lora"]
    return [
        Part("tests", tests, 130),
        Part("kernels", script("kernels", "--quick"), 90),
        Part("loss", script("loss"), 60),
        Part("step", script("step", *LLAMA, *methods), 180),
        Part("quickstart", quickstart, 120, missing),
    ]


def run(part: Part, out: Path) -> dict:
    """The result of a part; what it says is in its log."""
    if part.why_not:
        return {"part": part.name, "result": f"left out: {part.why_not}", "seconds": 0.0}
    start, log = time.monotonic(), out / f"{part.name}.log"
    print(f"{part.name}: at most {part.limit_s} s, {log}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                part.words, stdout=file, stderr=subprocess.STDOUT, timeout=part.limit_s, cwd=ROOT
            ).returncode
            result = "ok" if code == 0 else f"failed with {code}: see {log.name}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {part.limit_s} s: see {log.name}"
    seconds = time.monotonic() - start
    print(f"{part.name}: {result}, {seconds:.0f} s", flush=True)
    return {"part": part.name, "result": result, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU, also where there is a GPU"
    )
    arguments = parser.parse_args()
    on_gpu = shutil.which("nvidia-smi") is not None and not arguments.rehearse
    if not on_gpu:
        print("no GPU is used: this is a rehearsal at tiny sizes, whose figures say nothing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = [run(part, arguments.out) for part in parts(on_gpu, arguments.out)]
    facts = {"is_rehearsal": not on_gpu, "machine": machine_facts(), "versions": versions(), "parts": results}
    write_json(arguments.out / "summary.json", facts)
    rows = [f"| {row['part']} | {row['result']} | {row['seconds']:.0f} |" for row in results]
    text = "\n".join(
        ["| part | result | seconds |", "|---|---|---|", *rows, "", json.dumps(facts["machine"]), ""]
    )
    write_bytes(arguments.out / "summary.md", text.encode())
    print(arguments.out / "summary.md")
    return int(any(row["result"].startswith(("failed", "stopped")) for row in results))


if __name__ == "__main__":
    sys.exit(main())
