"""`--resume` on the command line: what it is taken for, and that its errors come before torch is imported."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speft_ds.cli import launch
from speft_ds.cli.launch import parse_arguments
from speft_ds.config.load_recipe import ROOT, load_recipe
from speft_ds.training.checkpoint.folder import folder_of
from speft_ds.training.checkpoint.resume import IF_ANY, NEWEST, Start
from unit import saved
from unit.saved import flip
from unit.written import write_inputs

RECIPE = ["--recipe", "mine.yaml"]


@pytest.fixture(autouse=True)
def ready(tmp_path, monkeypatch):
    """A folder with mine.yaml and what it names, and a module torch that cannot be imported."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")


def make_run(*steps, **facts):
    """The run folder of mine.yaml, with checkpoints of these steps."""
    return saved.make_run(load_recipe("mine.yaml"), *steps, **facts)


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return parse_arguments("train", "")


# What the words are taken for


@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        ([], None, []),
        (["seed=1"], None, ["seed=1"]),
        (["--resume"], NEWEST, []),
        (["--resume", "--local_rank=0"], NEWEST, []),
        (["--resume", "auto"], IF_ANY, []),
        (["--resume=auto", "seed=1"], IF_ANY, ["seed=1"]),
        (["--resume", "runs/mine"], "runs/mine", []),
        (["--resume", "runs/mine", "seed=1", "optimizer.lr=1"], "runs/mine", ["seed=1", "optimizer.lr=1"]),
        (["seed=1", "--resume", "runs/mine", "optimizer.lr=1"], "runs/mine", ["seed=1", "optimizer.lr=1"]),
        (["--resume", "seed=1"], NEWEST, ["seed=1"]),
        (["--resume", "seed=1", "optimizer.lr=1"], NEWEST, ["seed=1", "optimizer.lr=1"]),
        (["optimizer.lr=1", "--resume"], NEWEST, ["optimizer.lr=1"]),
    ],
)
def test_a_path_and_an_override_after_resume_are_told_apart(monkeypatch, arguments, resume, overrides):
    for words in ([*RECIPE, *arguments], [*arguments, *RECIPE]):
        found = parsed(monkeypatch, *words)
        assert (found.recipe, found.resume, found.overrides) == ("mine.yaml", resume, overrides)
        assert found.resume_with == []


def test_a_run_folder_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lr=3").mkdir(parents=True)
    found = parsed(monkeypatch, "--resume", "runs/lr=3", "seed=1")
    assert (found.resume, found.overrides) == ("runs/lr=3", ["seed=1"])


def test_of_one_key_twice_the_last_counts(monkeypatch):
    for words in (["seed=1", "--resume", "seed=2"], ["--resume", "seed=1", "seed=2"]):
        found = parsed(monkeypatch, *RECIPE, *words)
        assert load_recipe(found.recipe, found.overrides).seed == 2


def test_several_changes_are_consented_to(monkeypatch):
    words = ["--resume", "--resume-with", "data.path=a b", "--resume-with", "eval.limit=3", "seed=1"]
    found = parsed(monkeypatch, *RECIPE, *words)
    assert found.resume == NEWEST and found.resume_with == ["data.path=a b", "eval.limit=3"]
    assert found.overrides == ["seed=1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*RECIPE, "--resume-with", "seed=1"], "--resume-with goes with --resume"),
        (["seed=1"], "the following arguments are required: --recipe"),
        ([*RECIPE, "--resume", "--resume-with"], "--resume-with: expected one argument"),
    ],
)
def test_words_that_do_not_go_together_are_refused(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        parsed(monkeypatch, *arguments)
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_nothing_is_resumed_when_masks_are_scored(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score.py", *RECIPE, "--resume"])
    with pytest.raises(SystemExit):
        parse_arguments("score", "")
    assert "--resume" in capsys.readouterr().err


# From the command line to where the run starts


def start_of(monkeypatch, *arguments, num_ranks=1):
    return launch.checked_start("train", parsed(monkeypatch, *arguments), num_ranks)


def test_the_start_is_what_the_command_line_says(monkeypatch):
    assert start_of(monkeypatch, *RECIPE)[1] == Start()
    assert start_of(monkeypatch, *RECIPE, "--resume", "auto")[1] == Start()
    folder = make_run(10, 20)
    older = str(folder_of(folder, 10))
    for words in ([*RECIPE, "--resume"], [*RECIPE, "--resume", "auto"], ["--resume", "runs/mine"]):
        recipe, start = start_of(monkeypatch, *words)
        assert (start.state, start.checkpoint.step, start.is_chosen) == ("resumed", 20, False)
        assert (recipe.output_dir, recipe.name) == ("runs/mine", "mine")
    recipe, start = start_of(monkeypatch, "--resume", older, "output_dir=runs/branch")
    assert (start.checkpoint.step, start.is_chosen, recipe.output_dir) == (10, True, "runs/branch")


def test_another_number_of_ranks_gets_a_micro_batch_that_fits(monkeypatch, capsys):
    make_run(10)
    recipe, start = start_of(monkeypatch, "--resume", "runs/mine", num_ranks=8)
    assert start.state == "resumed" and recipe.train.micro_batch == 2
    assert "for 8 rank(s) train.micro_batch=2 (it was 4)" in capsys.readouterr().out


def test_a_change_that_was_consented_to_is_made(monkeypatch, tmp_path):
    make_run(10)
    (tmp_path / "rows.jsonl").rename("moved.jsonl")
    recipe, start = start_of(monkeypatch, "--resume", "runs/mine", "--resume-with", "data.path=moved.jsonl")
    assert (recipe.data.path, start.checkpoint.step) == ("moved.jsonl", 10)


# Launched without torch


def done(*arguments, **environment):
    """A script, started as the launcher does: (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--local_rank=0", *arguments]
    env = os.environ | {"PYTHONPATH": "stub"} | environment
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def damaged():
    flip(make_run(10) / "checkpoints" / "step_000010" / "manifest.json", 30)


# What is typed, before what is there -> what is said.
REFUSED = {
    "which run": (lambda: None, ["--resume"], "--resume alone does not say which run"),
    "without resume": (lambda: make_run(10), RECIPE, "go on with the run in it: --resume"),
    "damaged": (damaged, [*RECIPE, "--resume", "auto"], "no complete checkpoint to resume from"),
    "changed": (lambda: make_run(10), [*RECIPE, "--resume", "seed=7"], "seed: 0 in the run, 7 now"),
    "a typo": (lambda: make_run(10), ["--resume", "runs/mine", "sed=7"], "did you mean seed?"),
    "rows are gone": (
        lambda: (make_run(10), Path("rows.jsonl").unlink()),
        ["--resume", "runs/mine"],
        "rows.jsonl",
    ),
    "beneath a file": (
        lambda: Path("file").write_text(""),
        [*RECIPE, "--resume", "auto", "output_dir=file/run"],
        "cannot be written",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_told_before_torch_is_imported(name):
    prepare, arguments, said = REFUSED[name]
    prepare()
    code, _, error = done(*arguments)
    assert code == 2 and said in error and "Traceback" not in error, error


def test_what_can_be_resumed_goes_on_to_torch():
    make_run(10)
    code, _, error = done("--resume", "runs/mine")
    assert code == 1 and "RuntimeError: torch was imported" in error


def test_of_a_finished_run_nothing_is_loaded():
    make_run(10, finished=True)
    code, out, error = done("--resume", "runs/mine")
    assert (code, error) == (0, "")
    assert out == "the run in runs/mine is finished: there is nothing to resume\n"
    assert done("--resume", "runs/mine", RANK="1", WORLD_SIZE="2") == (0, "", "")


def test_a_run_that_somebody_writes_to_is_not_resumed(tmp_path):
    folder = make_run(10)
    hold = "import sys, time; from pathlib import Path; from speft_ds.training import run_dir as r"
    script = f"{hold}; lock = r.Lock(Path('{folder}')); print(1, flush=True); time.sleep(3600)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with contextlib.closing(holder.stdout):
            patched = (
                "from speft_ds.cli import launch; from speft_ds.training import run_dir as r; "
                "r.LOCK_WAIT_S = 0.2; launch.start('train', '')"
            )
            command = [sys.executable, "-c", patched, "--resume", str(folder)]
            ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            holder.kill()
    assert ended.returncode == 2 and ended.stderr.startswith(f"another run is writing to {folder}\n")
