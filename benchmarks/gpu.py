"""Tests and benchmarks of a GPU, in under ten minutes: `make gpu`.

    python benchmarks/gpu.py [--out FOLDER] [--geometry NAME ...] [--rehearse]

Runs the tests that need a GPU, those of the core on ranks that have one each, the kernels, the loss, a step
of Llama-2-7B and the quickstart, each with a time limit of its own, so that one failure leaves the others'
results. `--geometry` measures a step of other models instead, as meta-llama/Meta-Llama-3-8B and
Qwen/Qwen2.5-7B: three minutes each, where two copies of the weights fit. Logs, JSON and `summary.md` are in
the folder. It needs no network; the quickstart runs where its model is prepared (`speft quickstart
--prepare-only`). Without a GPU it says so and rehearses: the same parts, at tiny sizes, on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402
from models import build, config_of  # noqa: E402

from speft_ds.cli.start_ranks import visible_gpus  # noqa: E402
from speft_ds.env import cache_folder, machine_facts, versions  # noqa: E402
from speft_ds.errors import UserError  # noqa: E402
from speft_ds.io import write_bytes, write_json  # noqa: E402
from speft_ds.tools.quickstart import is_ready  # noqa: E402

TINY = {
    **{"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
}
GEOMETRIES = ["meta-llama/Llama-2-7b-hf", "1B"]  # of which the first that fits is measured
STEP = ["--dtype", "bfloat16", "--rows", "1", "--length", "4096", "--ranks", "1"]
STEP += ["--compute", "0.1", "0.05", "--methods", "speft_ds", "lora"]
ON_RANKS = [f"tests/distributed/test_{name}.py" for name in ("steps", "gradient", "selection", "invariants")]
ROOM_GIB = 12.0  # beside the weights of the floor and of a method: activations, logits, two CUDA contexts


@dataclass(frozen=True)
class Part:
    """A command with its time limit; `why_not`: why it is left out."""

    name: str
    words: list[str]
    limit_s: int
    why_not: str | None = None


def gpu_gib() -> float:
    """Memory of the smallest GPU that is visible."""
    query = [
        "nvidia-smi",
        f"--id={','.join(map(str, visible_gpus()))}",
        "--query-gpu=memory.total",
        "--format=csv,noheader,nounits",
    ]
    sizes = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return min(map(float, sizes)) / 1024


@functools.cache  # a model on the meta device takes seconds
def room_for(geometry: str, gib: float) -> str | None:
    """Why a step of this geometry does not fit into a GPU; None: it does.

    Args:
        gib: memory of the GPU, which holds the floor's and a method's weights side by side.
    Raises:
        UserError: there is no such geometry.
    """
    weights = build(config_of(geometry), "bfloat16", "meta").parameters()
    needed = 2 * sum(weight.numel() * weight.element_size() for weight in weights) / 2**30 + ROOM_GIB
    return None if needed <= gib else f"it needs {needed:.0f} GiB, the GPU has {gib:.0f}"


def step_parts(geometries: list[str] | None, gib: float, out: Path) -> list[Part]:
    """A step of each geometry; None: of the first of GEOMETRIES that fits."""
    if geometries is None:
        geometries = [next((name for name in GEOMETRIES if room_for(name, gib) is None), GEOMETRIES[-1])]
    made = []
    for geometry in geometries:
        name = f"step_{geometry.split('/')[-1]}"
        words = script("step", out / name, *STEP, "--geometry", geometry)
        made.append(Part(name, words, 180, room_for(geometry, gib)))
    return made


def script(name: str, result: Path, *words: str) -> list[str]:
    """The command of a benchmark that writes `result`.json."""
    return [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *words, "--json", f"{result}.json"]


def parts(on_gpu: bool, out: Path, geometries: list[str] | None = None) -> list[Part]:
    """What to run, in the order in which it is worth most."""

    pytest = [sys.executable, "-m", "pytest", "-q"]
    tests = [*pytest, "-s", "tests/gpu"]
    speft = str(Path(sys.executable).with_name("speft"))
    choice = [speft, "doctor", "--kernels"]  # the table that `auto` goes by, in its log
    if not on_gpu:
        tiny = out / "tiny.json"
        write_json(tiny, TINY)
        step = ["--config", str(tiny), "--rows", "2", "--length", "16", "--rounds", "1", "--compute", "0.3"]
        one = ["--ranks", "1", "--methods", "speft_ds"]
        return [
            Part("tests", [*tests, "--collect-only"], 300),
            Part("ranks", [*pytest, ON_RANKS[0], "-k", "single_rank"], 300),
            Part("choice", choice, 300),
            Part("kernels", script("kernels", out / "kernels", "--tiny", "--rounds", "1"), 300),
            Part("loss", script("loss", out / "loss", "--tiny", "--rounds", "1"), 300),
            Part("step", script("step", out / "step", *step, *one), 300),
            Part("quickstart", [], 0, "it takes long on a CPU: make quickstart"),
        ]
    missing = (
        None if is_ready(cache_folder()) else "its model is not prepared: speft quickstart --prepare-only"
    )
    quickstart = [speft, "quickstart", f"output_dir={out / 'quickstart'}"]
    return [
        Part("tests", tests, 60),
        Part("ranks", [*pytest, "-rs", *ON_RANKS], 90),
        Part("choice", choice, 40),
        Part("kernels", script("kernels", out / "kernels", "--quick"), 55),
        Part("loss", script("loss", out / "loss"), 50),
        *step_parts(geometries, gpu_gib(), out),
        Part("quickstart", quickstart, 120, missing),
    ]


def run(part: Part, out: Path) -> dict:
    """The result of a part; what it says is in its log."""
    if part.why_not:
        return {"part": part.name, "result": f"left out: {part.why_not}", "seconds": 0.0}
    start, log = time.monotonic(), out / f"{part.name}.log"
    print(f"{part.name}: at most {part.limit_s} s, {log}", flush=True)
    with open(log, "w", encoding="utf-8") as file:
        how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "start_new_session": True}
        process = subprocess.Popen(part.words, **how)
        try:
            code = process.wait(part.limit_s)
            result = "ok" if code == 0 else f"failed with {code}: see {log.name}"
        except subprocess.TimeoutExpired:
            kill_family(process)
            result = f"stopped after {part.limit_s} s: see {log.name}"
    seconds = time.monotonic() - start
    print(f"{part.name}: {result}, {seconds:.0f} s", flush=True)
    return {"part": part.name, "result": result, "seconds": seconds}


def kill_family(process: subprocess.Popen) -> None:
    """Kill a part with all that it started: ranks in sessions of their own would keep the GPU's memory."""
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)  # also those whose parent has ended
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(started, timeout=10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--geometry", nargs="+", metavar="NAME", help="measure a step of these models")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU, also where there is a GPU"
    )
    arguments = parser.parse_args()
    on_gpu = bool(visible_gpus()) and not arguments.rehearse
    if not on_gpu:
        print("no GPU is used: this is a rehearsal at tiny sizes, whose figures say nothing")
        os.environ["DS_ACCELERATOR"] = "cpu"
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = [run(part, arguments.out) for part in parts(on_gpu, arguments.out, arguments.geometry)]
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
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
