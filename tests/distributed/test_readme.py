"""Every command of these pages runs: as it stands, or shortened by overrides that come behind it.

The commands find a tiny model where the quickstart's would be; `make quickstart` trains the real one. Most
run in forked processes, which need not import what a shell's would.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from limits import HANG_S
from live import SPEFT, LiveRun, run_script
from tiny import make_model
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.tools import quickstart
from speft_ds.tools.inbox_data import write_data, write_task
from speft_ds.tools.quickstart import default_cache_dir

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = [
    "train.steps=1",
    "optimizer.warmup_steps=1",
    "train.global_batch=4",
    "train.micro_batch=2",
    "mask.calibration_samples=2",
    "eval.tasks=[]",
    "data.max_length=1024",  # of bytes, which are the tiny model's tokens
]
PAGES = [
    "README.md",
    "recipes/README.md",
    *(f"docs/{n}.md" for n in ("recipes", "data", "masks", "evaluation", "checkpoints")),
]
COMMAND = "command.json"
# How a command is run, by its beginning, the first that fits: what is added behind it and the exit codes
# that it may have; or why it is not run here.
HOW = {
    "make quickstart": "test_quickstart_trains_the_real_model",
    "make test": "this is it",
    "source": "of the shell",
    "speft train llama2": ([], {2}),  # refused: the weights are not here
    "speft evaluate --model": "not with these weights; test_evaluated_runs.py has others",
    "speft evaluate": (["--limit", "2"], {0}),
    "speft tune": "test_tune.py does, on a model that takes seconds",
    "deepspeed": (SHORT, {0}),
    "speft doctor": "test_doctor.py does",
    "speft train --resume": ([], {0}),
    "speft train": (SHORT, {0}),
    "speft score": (["mask.calibration_samples=2", "data.max_length=1024"], {0}),
    "speft compare-masks": ([], {0}),
    "speft validate llama2": ([], {2}),  # says what is missing
    "speft": ([], {0}),
}


def commands(pages: list[str] = PAGES) -> list[str]:
    found = []
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]
    return list(dict.fromkeys(found))


def how(command: str):
    return next(how for beginning, how in HOW.items() if command.startswith(beginning))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user would be: the repository's files, its own `runs`, and what the quickstart prepares."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launch", "recipes", "ds_configs", "speft_ds"):
        (folder / name).symlink_to(ROOT / name)
    cache = folder / "cache" / "speft_ds"
    make_model(cache / quickstart.NAME, max_position_embeddings=2048)
    write_task(cache / "quickstart" / "tasks", *write_data(cache / "quickstart"))
    return folder


def keep_command() -> None:
    """In a forked `speft`: the launcher's command line is written down, and not run."""
    from speft_ds.cli import start_ranks

    start_ranks.run_to_end = lambda command, *_: Path(COMMAND).write_text(json.dumps(command)) * 0


def run(words: list[str], folder: Path, is_forked: bool = True) -> tuple[int, str]:
    """The exit code of a command, and all that it printed. The launcher starts what takes every GPU."""
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    own |= {"DS_ACCELERATOR": "cpu", "MPLCONFIGDIR": matplotlib.get_cachedir()}
    if is_forked and words[0] == "speft":
        starts_ranks = words[1] in ("train", "evaluate", "score")
        code, said = run_script(SPEFT, words[1:], folder, keep_command if starts_ranks else None, **own)
        if not (folder / COMMAND).exists():
            return code, said
        words = json.loads((folder / COMMAND).read_text())
        (folder / COMMAND).unlink()
    if is_forked and words[1] == "--num_gpus":
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        log, job = folder / f"{time.monotonic_ns()}.log", Path(words[script]).stem
        ranks = LiveRun(log, words[script + 1 :], int(words[2]), job=job, folder=folder, **own)
        return max(map(abs, ranks.codes())), ranks.text()
    beside = str(Path(sys.executable).parent)
    env = {**os.environ, **own, "PATH": f"{beside}:{os.environ['PATH']}"}
    env.pop("HF_HUB_CACHE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=folder, env=env, timeout=HANG_S, check=False, **pipes)
    return done.returncode, done.stdout


def test_the_commands_are_found():
    found = commands()
    assert len(found) >= 12
    for name in ("ls", "show", "score", "validate", "plan", "doctor", "data", "cp", "schema"):
        assert any(command.startswith(f"speft {name}") for command in found), name
    assert sum(command.startswith("speft train") for command in found) >= 2


def test_quickstart_trains_the_real_model(tmp_path):
    """`make quickstart`, shortened."""
    short = ["model.dtype=float32", "train.steps=3", "optimizer.warmup_steps=1", "train.global_batch=4"]
    short += ["train.micro_batch=2", "mask.calibration_samples=4", "eval.before=false", "eval.limit=2"]
    made = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("speft")), "quickstart", f"output_dir={made}", *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    facts = json.loads((made / "run.json").read_text())
    assert facts["mask"]["num_trainable"] == 530_842  # 0.5% of 210 linears, 106,168,320 entries
    assert (made / "adapter" / "adapter.safetensors").stat().st_size < 5.5 * 530_842
    (row,) = json.loads((made / "eval" / "after.json").read_text())["scores"]
    assert (row["task"], row["num_documents"]) == ("quickstart_json", 2)
    assert (made / "report.html").stat().st_size > 50_000
    # The adapter fits the checkpoint that was downloaded, and changes at most the masked entries.
    folder = default_cache_dir() / "SmolLM2-135M-Instruct"
    base, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    speft_ds.apply_adapter(model, made / "adapter")
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    changed = sum(int((one != two).sum()) for one, two in pairs)
    assert 0.9 * 530_842 < changed <= 530_842


@pytest.mark.parametrize("command", [c for c in commands() if not isinstance(how(c), str)])
def test_a_command_runs(command, folder):
    more, codes = how(command)
    if command.startswith("speft compare-masks"):
        make_masks(folder)
    if "runs/quickstart" in command or "--resume" in command or command == "speft runs":
        make_run(folder)
    code, said = run([*shlex.split(command), *more], folder, is_forked=codes != {2})
    assert code in codes and "Traceback" not in said, said
    if codes == {2}:  # for no other reason than that the weights and the rows are not here
        missing = "is not in the hub's cache|no model folder /models|no data file /data"
        assert len(re.findall(missing, said)) == said.count("where: ") == 2, said


def make_run(folder: Path) -> None:
    """The run that the README goes on with; here it is finished (test_stopping.py has some that are not)."""
    run_folder, before = folder / "runs" / "quickstart", folder / "runs" / "mine"  # of a command before
    if not run_folder.exists() and before.exists():
        shutil.copytree(before, run_folder)
    elif not run_folder.exists():
        command = ["deepspeed", "--num_gpus", "2", "launch/train.py", "--recipe", "quickstart", *SHORT]
        code, said = run(command, folder)
        assert code == 0, said


def make_masks(folder: Path) -> None:
    """The two runs that the README compares; here they are the same."""
    if not (masks := list(folder.glob("runs/*/mask.safetensors"))):  # of the command before
        command = ["speft", "score", "quickstart", "mask.salience=random", "data.max_length=1024"]
        code, said = run(command, folder)
        assert code == 0, said
        masks = list(folder.glob("runs/*/mask.safetensors"))
    for name in "ab":
        shutil.copytree(masks[0].parent, folder / "runs" / name)
