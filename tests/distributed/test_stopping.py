"""Stopped by a signal, moved to other ranks, gone on with: live runs of the real command."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from limits import HANG_S
from live import LiveRun, metrics, whole_steps
from tiny import recipe_values

from distributed import rank_hooks
from distributed.reference import read_entries
from speft_ds.env import free_port

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


@pytest.fixture
def recipe(tiny, tmp_path):
    """The path of a recipe; its run folder is tmp_path/run."""
    train = {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "checkpoint_every": None}
    values = recipe_values(tiny, optimizer={"eps": 1e-5}, train=train, output_dir=str(tmp_path / "run"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def start(recipe, tmp_path):
    """start(more arguments, ranks): a live run of the recipe."""
    runs = []

    def begin(*more, num_ranks=2, hooks=None):
        run = LiveRun(tmp_path / f"log{len(runs)}", ["--recipe", str(recipe), *more], num_ranks, hooks)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.kill()


def after_step(run, step):
    run.wait_for(f"step {step:>5}/")


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(start, tmp_path, number, rank):
    run = start("train.steps=100_000")  # more than it can make before the signal
    after_step(run, 3)
    run.signal(number, rank)
    assert run.codes() == [85, 85], run.text()
    done = metrics(tmp_path / "run")[-1]["step"]
    assert 3 <= done < 100_000 and whole_steps(tmp_path / "run") == [done]
    assert run.text().count(f"stopped: received {number.name}") == 1
    assert f"go on with: --resume {tmp_path / 'run'}" in run.text() and "Traceback" not in run.text()


def test_a_signal_while_the_mask_is_chosen_anew(start, tmp_path):
    """What the steps before have learnt is in the checkpoint, too."""
    periodic = ["mask.schedule=periodic", "mask.update_every=3"]
    run = start(*periodic, hooks={1: rank_hooks.asked_while_selecting})
    run.wait_for("choosing anew")
    run.signal(signal.SIGTERM, 1)
    assert run.codes() == [85, 85], run.text()
    # The ranks had agreed on step 3 before: they stop at the end of the next one.
    assert whole_steps(tmp_path / "run") == [4] and "mask changed after step 3" in run.text()


def test_from_2_ranks_to_1_to_4(start, tmp_path):
    """Equal to the undisturbed run: the rows, the losses and the deltas, to the order of sums."""
    whole = start(f"output_dir={tmp_path / 'whole'}")
    assert whole.codes() == [0, 0], whole.text()
    run = start(hooks={0: partial(rank_hooks.asked_in_step, 5, signal.SIGUSR1)})
    assert run.codes() == [85, 85], run.text()
    run = start("--resume", num_ranks=1, hooks={0: partial(rank_hooks.asked_in_step, 12, signal.SIGTERM)})
    assert run.codes() == [85], run.text()
    first, second = whole_steps(tmp_path / "run")[::-1]
    run = start("--resume", num_ranks=4)
    assert run.codes() == [0] * 4, run.text()
    assert f"step {second} of {STEPS}, on 4 rank(s), it was written by 1" in run.text()
    assert 4 <= first < 12 <= second < STEPS
    got, wanted = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["num_tokens"] for line in got] == [line["num_tokens"] for line in wanted]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in wanted], abs=1e-5)
    expected = read_entries(tmp_path / "whole")
    for name, (index, delta) in read_entries(tmp_path / "run").items():
        assert torch.equal(index, expected[name][0]) and (delta - expected[name][1]).abs().max() < 1e-5, name


def test_a_micro_batch_that_does_not_fit_the_ranks_is_made_to(start, tmp_path):
    run = start("train.micro_batch=8", hooks={1: partial(rank_hooks.asked_in_step, 2, signal.SIGTERM)})
    assert run.codes() == [85, 85], run.text()
    run = start("train.micro_batch=8", "--resume", num_ranks=4)
    assert run.codes() == [0] * 4 and "for 4 rank(s) train.micro_batch=4 (it was 8)" in run.text()


def test_a_second_ctrl_c_leaves_at_once(start, tmp_path):
    run = start("train.checkpoint_every=1", hooks=dict.fromkeys((0, 1), rank_hooks.endless_steps))
    run.wait_for("an endless step")
    for rank in (0, 1):
        run.signal(signal.SIGINT, rank)
    run.wait_for("received SIGINT")
    for rank in (0, 1):
        run.signal(signal.SIGINT, rank)
    assert set(run.codes()) <= {130, 1} and 130 in run.codes()
    assert whole_steps(tmp_path / "run")


def test_stopped_before_its_first_step(start, tmp_path):
    """Nothing is lost, since there was nothing: `--resume` starts from the beginning, and says so."""
    run = start("train.steps=3", hooks={0: rank_hooks.asked_while_loading})
    run.wait_for("loading")
    run.signal(signal.SIGTERM, 0)
    assert run.codes() == [85, 85], run.text()
    assert not (tmp_path / "run" / "checkpoints").exists() and "--resume auto" in run.text()
    run = start("train.steps=3", "--resume", "auto")
    assert run.codes() == [0, 0], run.text()
    assert len(metrics(tmp_path / "run")) == 3


def test_validation_loss_and_the_best_checkpoint(start, tiny, tmp_path):
    """The loss rises from some point on, by a rate that is far too high; the best checkpoint is kept."""
    common = ["train.keep_best=true", f"eval.validation={tiny['data']}", "eval.every=2", "train.keep_last=1"]
    common += ["train.checkpoint_every=5", "optimizer.lr=0.3"]
    run = start(*common, hooks={0: partial(rank_hooks.asked_in_step, 10, signal.SIGTERM)})
    assert run.codes() == [85, 85], run.text()
    run = start(*common, "--resume")
    assert run.codes() == [0, 0], run.text()
    lines = [line for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    best = min(lines, key=lambda line: line["validation_loss"])["step"]
    assert sorted(whole_steps(tmp_path / "run")) == sorted({best, STEPS})
    whole = start(*common, f"output_dir={tmp_path / 'w'}")
    assert whole.codes() == [0, 0]
    assert metrics(tmp_path / "w") == metrics(tmp_path / "run")


def test_the_launcher_is_stopped_and_the_run_resumed_at_once(recipe, tmp_path):
    """`deepspeed` dies of SIGUSR1 without a word: its ranks notice, and a resume waits for them to end."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / "launch/train.py")]
    first = tmp_path / "first.log"
    with first.open("w") as log:
        process = subprocess.Popen(
            [*command, "--recipe", str(recipe), "train.steps=100_000"], env=env, stdout=log, stderr=log
        )
    deadline = time.monotonic() + HANG_S
    while "step     5/" not in first.read_text():
        assert process.poll() is None and time.monotonic() < deadline, first.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(HANG_S) == -signal.SIGUSR1
    command[4] = str(free_port())
    resumed = subprocess.Popen(
        [*command, "--resume", str(tmp_path / "run")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in resumed.stdout:
        lines.append(line)
        if "resuming from" in line:
            break
    number = int(lines[-1].partition("step ")[2].split()[0])
    assert "the launcher has ended" in first.read_text() and number >= 5
    assert f"step_{number:06d}; go on with" in first.read_text()
    ranks = subprocess.run(
        ["pgrep", "-f", f"launch/train.py.*--resume {tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    for pid in ranks.stdout.split():  # the launchers and the ranks, as `pkill -USR1 -f` would
        os.kill(int(pid), signal.SIGUSR1)
    resumed.stdout.read()
    resumed.wait(HANG_S)
    assert max(whole_steps(tmp_path / "run")) > number
