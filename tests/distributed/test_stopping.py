"""Stopped by a signal, moved to other ranks, gone on with: live runs of the real command."""

import json
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
from live import finishes, metrics, whole_steps
from tiny import recipe_values

from distributed import rank_hooks
from distributed.reference import read_entries

STEPS = 30


@pytest.fixture
def values(tiny, tmp_path):
    train = {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "checkpoint_every": None}
    return recipe_values(tiny, optimizer={"eps": 1e-5}, train=train, output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(start, tmp_path, number, rank):
    run = start("train.steps=100_000")  # more than it can make before the signal
    run.wait_for("step     3/")
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
    finishes(start(f"output_dir={tmp_path / 'whole'}"))
    run = start(hooks={0: partial(rank_hooks.asked_in_step, 5, signal.SIGUSR1)})
    assert run.codes() == [85, 85], run.text()
    run = start("--resume", num_ranks=1, hooks={0: partial(rank_hooks.asked_in_step, 12, signal.SIGTERM)})
    assert run.codes() == [85], run.text()
    first, second = whole_steps(tmp_path / "run")[::-1]
    said = finishes(start("--resume", num_ranks=4))
    assert f"step {second} of {STEPS}, on 4 rank(s), it was written by 1" in said
    assert 4 <= first < 12 <= second < STEPS
    got, wanted = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["num_tokens"] for line in got] == [line["num_tokens"] for line in wanted]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in wanted], abs=1e-5)
    expected = read_entries(tmp_path / "whole")
    for name, (index, delta) in read_entries(tmp_path / "run").items():
        assert torch.equal(index, expected[name][0]) and (delta - expected[name][1]).abs().max() < 1e-5, name


def test_a_micro_batch_that_does_not_fit_the_ranks_is_made_to(start):
    short = ["train.micro_batch=8", "train.steps=4"]
    run = start(*short, hooks={1: partial(rank_hooks.asked_in_step, 2, signal.SIGTERM)})
    assert run.codes() == [85, 85], run.text()
    said = finishes(start(*short, "--resume", num_ranks=4))
    assert "for 4 rank(s) train.micro_batch=4 (it was 8)" in said


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
    finishes(start("train.steps=3", "--resume", "auto"))
    assert len(metrics(tmp_path / "run")) == 3


def test_validation_loss_and_the_best_checkpoint(start, tmp_path):
    """The loss on bytes that are not trained rises from some point on; the best checkpoint is kept."""
    rows = tmp_path / "others.jsonl"
    rows.write_text("".join(f'{{"prompt": "say", "response": "{text}"}}\n' for text in ("ZQXJ", "KWV")))
    common = ["train.keep_best=true", f"eval.validation={rows}", "eval.every=2", "train.keep_last=1"]
    common += ["train.checkpoint_every=5", "optimizer.lr=0.3", "train.steps=16"]
    run = start(*common, hooks={0: partial(rank_hooks.asked_in_step, 10, signal.SIGTERM)})
    assert run.codes() == [85, 85], run.text()
    finishes(start(*common, "--resume"))
    lines = [line for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in lines] == list(range(2, 17, 2))
    best = min(lines, key=lambda line: line["validation_loss"])["step"]
    assert best < 16 and sorted(whole_steps(tmp_path / "run")) == [best, 16]
    finishes(start(*common, f"output_dir={tmp_path / 'w'}"))
    assert metrics(tmp_path / "w") == metrics(tmp_path / "run")


def test_the_launcher_is_stopped_and_the_run_resumed_at_once(launcher, write, tmp_path):
    """`deepspeed` dies of SIGUSR1 without a word: its ranks notice, and a resume waits for them to end."""
    command, env = launcher()
    first = tmp_path / "first.log"
    with first.open("w") as log:
        command += ["--recipe", str(write()), "train.steps=100_000"]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + HANG_S
    while "step     5/" not in first.read_text():
        assert process.poll() is None and time.monotonic() < deadline, first.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(HANG_S) == -signal.SIGUSR1
    # By `speft train`, which its ranks stop with on Ctrl-C, and which has their exit code.
    command = [str(Path(sys.executable).with_name("speft")), "train", "--resume", str(tmp_path / "run")]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    resumed = subprocess.Popen([*command, "--ranks", "2"], env=env, **pipe)
    shown = []
    for line in resumed.stdout:
        shown.append(line)
        if line.startswith("step "):  # it was resumed, and trains
            break
    resumed.send_signal(signal.SIGINT)
    shown += resumed.stdout
    assert resumed.wait(HANG_S) == 85, shown
    (line,) = [line for line in shown if "resuming from" in line]
    number = int(line.partition("step ")[2].split()[0])
    assert "the launcher has ended" in first.read_text() and number >= 5
    assert f"step_{number:06d}; go on with" in first.read_text()
    assert max(whole_steps(tmp_path / "run")) > number
    assert not [line for line in shown if line.startswith("[") or "Traceback" in line], shown


def test_ranks_that_are_not_alike_run_in_one_dtype_and_a_resumed_run_keeps_it(values, start, tmp_path):
    values["model"]["dtype"] = "auto"

    def run(*more, multiplies_bfloat16):
        answer = rank_hooks.answers_for_the_hardware
        hooks = {rank: partial(answer, answers) for rank, answers in enumerate(multiplies_bfloat16)}
        said = finishes(start("train.steps=4", "train.checkpoint_every=4", *more, hooks=hooks))
        return [line for line in said.splitlines() if "model.dtype" in line]

    def dtypes(folder):
        facts = json.loads((folder / "adapter" / "adapter.json").read_text())
        return yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["dtype"], facts["dtype"]

    (said,) = run(multiplies_bfloat16=[True, False])
    assert "float32" in said and dtypes(tmp_path / "run") == ("float32", "float32")
    (said,) = run(f"output_dir={tmp_path / 'fast'}", multiplies_bfloat16=[True, True])
    assert "bfloat16" in said and dtypes(tmp_path / "fast") == ("bfloat16", "bfloat16")
    # On ranks that would take bfloat16, from the run's own first checkpoint.
    first = tmp_path / "run" / "checkpoints" / "step_000004"
    assert first.is_dir()
    branch = ["--resume", str(first), f"output_dir={tmp_path / 'branch'}"]
    (said,) = run(*branch, multiplies_bfloat16=[True, True])
    assert "float32" in said and dtypes(tmp_path / "branch") == ("float32", "float32")
