"""What goes wrong in a run ends it on all ranks, soon, with the first cause and the way on: live runs."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml
from limits import HANG_S
from live import LiveRun, finishes, is_refused, metrics, whole_steps
from tiny import make_data, make_model, recipe_values
from unit.saved import flip, reseal

from distributed import rank_hooks

STEPS = 12
SILENT_MINUTES = 0.75  # of a rank that hangs; each stage of these runs takes less, on a busy machine, too

DIES_AFTER_STEP_9 = {0: rank_hooks.dies_after_step_9, 1: rank_hooks.writes_step_8_at_once}
NAN_IN_STEP_3 = partial(rank_hooks.nan_in_steps, 3, 3)


@pytest.fixture
def values(tiny, tmp_path):
    """A recipe; its run folder is tmp_path/run."""
    train = {"steps": STEPS, "checkpoint_every": 2}
    return recipe_values(tiny, train=train, output_dir=str(tmp_path / "run"))


def ends(run, codes):
    """It ends by itself; returns what it said after its last step, without the libraries' noise."""
    assert run.codes() == codes, run.text()
    lines = [line for line in run.text().splitlines() if not line.startswith(("[W", "[E", "step ", "["))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("rank", "num_ranks", "raises"), [(0, 2, rank_hooks.raises), (2, 4, rank_hooks.raises_in_a_backward)]
)
def test_a_rank_that_raises(start, tmp_path, rank, num_ranks, raises):
    run = start(num_ranks=num_ranks, hooks={rank: raises})
    said = ends(run, [1] * num_ranks)
    assert said.count("Traceback") == 1 and said.count(f"rank {rank} failed:") == 1, said
    assert "RuntimeError: boom" in said
    assert f"--resume {tmp_path / 'run'}" in said.splitlines()[-1]
    step = whole_steps(tmp_path / "run")[0]  # the save of the step before may have been in flight
    again = start("--resume", num_ranks=num_ranks)
    assert again.codes() == [0] * num_ranks and f"step_{step:06d}: step {step}" in again.text()


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 2), (3, 4)])
def test_a_rank_that_is_killed(start, rank, num_ranks):
    run = start("train.steps=1000", num_ranks=num_ranks)
    run.wait_for("step     5/")
    run.signal(signal.SIGKILL, rank)
    said = ends(run, [-9 if number == rank else 1 for number in range(num_ranks)])
    assert said.count(f"rank {rank} died") == 1 and "Traceback" not in said, said
    assert "go on with: --resume" in said


def test_a_rank_that_hangs_or_is_frozen(start, tmp_path):
    """Three runs at once, since they wait: rank 0 or rank 1 hangs; rank 1 is frozen, as by a broken network,
    and cannot even say so.
    """
    silent = f"train.timeout_minutes={SILENT_MINUTES}"
    hung = [start(silent, f"output_dir={tmp_path}/{rank}", hooks={rank: rank_hooks.hangs}) for rank in (0, 1)]
    frozen = start(silent, "train.steps=100_000")
    frozen.wait_for("step     3/")
    frozen.signal(signal.SIGSTOP, 1)
    for rank, run in enumerate(hung):
        said = ends(run, [1, 1])
        assert said.count("train.timeout_minutes") == 1 and f"rank {rank} made no progress" in said, said
        assert "after: step 3" in said and "time.sleep(2 * HANG_S)" in said and "--resume" in said, said
    frozen.processes[0].join(HANG_S)
    assert frozen.processes[0].exitcode == 1 and "no answer from rank 1" in frozen.text(), frozen.text()
    frozen.signal(signal.SIGKILL, 1)


def test_a_step_that_is_not_finite_is_skipped(start, tmp_path):
    """NaN on one rank in step 3, and an infinite gradient in step 6: nothing moves, on any rank."""
    run = start(hooks={1: NAN_IN_STEP_3, 0: rank_hooks.infinite_gradient_in_step_6})
    assert run.codes() == [0, 0], run.text()
    lines = metrics(tmp_path / "run")
    assert [line["num_skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert lines[2]["loss"] is None and lines[5]["loss"] is not None and lines[5]["grad_norm"] is None
    assert lines[3]["lr"] == lines[2]["lr"] and lines[6]["lr"] == lines[5]["lr"] > lines[7]["lr"]
    assert all(line["loss"] is not None for line in lines[6:])


@pytest.mark.parametrize(
    ("mask", "stays"),
    [({"growth": "sft_ag", "update_every": 3, "growth_steps": 1}, True), ({"growth": "sft_ma"}, False)],
)
def test_schedules_do_not_learn_from_what_is_not_finite(values, start, tmp_path, mask, stays):
    values["mask"] |= {"schedule": "drop_grow", "update_every": 4, **mask}
    run = start(hooks={1: NAN_IN_STEP_3})
    assert run.codes() == [0, 0], run.text()
    assert metrics(tmp_path / "run")[-1]["num_skipped"] == 1
    assert ("mask stays after step 3" in run.text()) == stays  # all it would have learnt from is step 3
    assert all(line["loss"] is not None for line in metrics(tmp_path / "run")[3:])


def test_too_many_in_a_row_stop_the_run(start, tmp_path):
    run = start(hooks={1: partial(rank_hooks.nan_in_steps, 6, STEPS)})
    said = ends(run, [2, 2])
    assert "the loss is nan" in said and "3 steps in a row were not finite" in said, said
    assert "Traceback" not in said and "go on with" not in said  # the same steps would fail again
    assert f"the last complete checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_000006'}" in said
    # A skipped step leaves the weights whole: the checkpoint of step 6 is written all the same.
    assert said.count("the loss is nan") == 1 and 6 in whole_steps(tmp_path / "run")


def test_a_diverging_run_stops_with_the_reason(start, tmp_path):
    said = ends(start("optimizer.lr=1e30", "optimizer.clip_norm=null"), [2, 2])
    reasons = [line for line in said.splitlines() if re.match("the (loss|gradient norm) is", line)]
    assert len(reasons) == 1 and "Traceback" not in said, said
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options): a file system of its own, as root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_up(file, left):
    """Take all space of a disk that a run writes to at the same time, but for `left` bytes."""
    with file.open("wb", buffering=0) as others, contextlib.suppress(OSError):
        while others.write(b"x" * 4096):
            pass
    os.truncate(file, file.stat().st_size - left)


def test_a_disk_that_fills_up(values, start, small_disk):
    disk = small_disk("size=2m")
    values["output_dir"] = str(disk / "run")
    run = start("train.steps=1000")
    run.wait_for("step     6/")
    fill_up(disk / "others", left=8192)
    said = ends(run, [2, 2])
    assert "cannot write" in said and "No space left" in said and "Traceback" not in said, said
    steps = whole_steps(disk / "run")
    assert steps and f"step_{steps[0]:06d}" in said
    (disk / "others").unlink()
    again = start("--resume", "train.steps=1000")
    again.wait_for(f"step {steps[0] + 3:>5}/")
    assert f"resuming from {disk / 'run' / 'checkpoints'}/step_{steps[0]:06d}" in again.text()


def test_a_disk_that_is_too_small_is_refused_at_the_start(values, start, small_disk):
    values["output_dir"] = str(small_disk("size=100k") / "run")
    values["mask"]["density"] = 0.9
    said = ends(start(), [2, 2])
    assert "3 checkpoints need" in said and "step     1" not in said, said


def test_a_read_only_disk_is_refused_before_anything_is_loaded(values, start, small_disk):
    values["output_dir"] = str(small_disk("ro,size=1m") / "run")
    run = start()
    assert 2 in run.codes() and "no right to write" in run.text() and "mask:" not in run.text()


def test_two_runs_in_one_folder(start, tmp_path):
    first = start("train.steps=1000")
    first.wait_for("step     3/")
    second = start("train.steps=1000")
    assert 2 in second.codes() and "is not empty" in second.text()
    third = start("train.steps=1000", "--resume", hooks={0: rank_hooks.short_wait, 1: rank_hooks.short_wait})
    assert 2 in third.codes() and "another run is writing to" in third.text()
    assert all(process.is_alive() for process in first.processes)


# Resumed


@pytest.fixture(scope="module")
def stopped_once(tiny, tmp_path_factory):
    """The folder of a run that stopped after 9 of its steps, with checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("stopped")
    train = {"steps": STEPS, "checkpoint_every": 2}
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe_values(tiny, train=train)))
    arguments = ["--recipe", str(folder / "mine.yaml"), f"output_dir={folder / 'run'}"]
    LiveRun(folder / "log", arguments, hooks=DIES_AFTER_STEP_9).codes()
    assert whole_steps(folder / "run") == [8, 6], (folder / "log").read_text()
    return folder / "run"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it as the run folder of the recipe."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def refuses(run, *parts):
    """It ends with a user error that names these, once."""
    is_refused(run)
    assert all(run.text().count(part) == 1 for part in parts), run.text()


def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(start, stopped, tmp_path):
    newest = stopped / "checkpoints" / "step_000008"
    part = newest / "part_00001.safetensors"
    flip(part, where=1000)
    refuses(start("--resume", str(newest)), part.name, "fix:")
    flip(part, where=1000)
    header, other = (b'"trained.index":{"dtype":"%s"' % dtype for dtype in (b"I32", b"F32"))
    assert header in part.read_bytes()
    part.write_bytes(part.read_bytes().replace(header, other))
    reseal(newest)  # by its hash it is what was written
    said = finishes(start("--resume"))
    assert str(newest) in said and "step_000006: step 6" in said
    finishes(start(f"output_dir={tmp_path / 'undisturbed'}"))
    assert metrics(stopped) == metrics(tmp_path / "undisturbed")
    files = [folder / "adapter" / "adapter.safetensors" for folder in (stopped, tmp_path / "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_valid_checkpoint_is_an_error(start, stopped):
    for step in (6, 8):
        flip(stopped / "checkpoints" / f"step_{step:06d}" / "part_00000.safetensors", where=1000)
    refuses(start("--resume"), "fix:")
    assert len(metrics(stopped)) == 9  # and nothing is touched


def test_another_base_and_other_rows_are_refused_whatever_the_user_says(start, stopped, tmp_path):
    model, rows = make_model(tmp_path / "other", seed=9), make_data(tmp_path / "other", num_rows=40)
    refuses(start("--resume", "--resume-with", f"model.name_or_path={model}"), "another base", "fix:")
    refuses(start("--resume", "--resume-with", f"data.path={rows}"), "training rows", "fix:")


def test_a_changed_recipe_is_refused_with_its_keys(start, stopped):
    run = start("--resume", "optimizer.lr=0.5", "mask.density=0.1")
    assert set(run.codes()) == {2}
    assert "optimizer.lr: 0.01 " in run.text() and "mask.density: 0.05 " in run.text()
    run = start("--resume", "--resume-with", "optimizer.lr=0.5")
    is_refused(run)
    assert "optimizer.lr: 0.01 " in run.text()


def test_a_run_branches_off_into_a_new_folder(start, stopped, tmp_path):
    finishes(
        start("--resume", str(stopped / "checkpoints" / "step_000006"), f"output_dir={tmp_path / 'new'}")
    )
    assert len(metrics(tmp_path / "new")) == STEPS and len(metrics(stopped)) == 9
    assert metrics(tmp_path / "new")[:9] == metrics(stopped)


def test_other_calibration_rows_are_refused_where_masks_are_chosen_anew(values, start, tiny, tmp_path):
    rows = tmp_path / "calibration.jsonl"
    rows.write_bytes(tiny["data"].read_bytes())
    values["mask"] |= {"calibration_path": str(rows), "schedule": "periodic", "update_every": 5}
    start(hooks=DIES_AFTER_STEP_9).codes()
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:] + lines[:1]))
    refuses(start("--resume"), "the calibration rows", "fix:")
    rows.write_bytes(tiny["data"].read_bytes())
    finishes(start("--resume"))


def test_a_port_that_another_run_has_taken(start):
    said = ends(start(num_ranks=1, hooks={0: rank_hooks.port_is_taken}), [2])
    assert "fix: deepspeed --master_port " in said and "Traceback" not in said, said


def test_the_lock_of_a_killed_build_does_not_hold_a_run_up(start, tmp_path):
    run = start("train.steps=1", hooks=dict.fromkeys((0, 1), rank_hooks.stale_build_lock))
    assert run.codes() == [0, 0] and "60 min old: its build was killed" in run.text(), run.text()


def test_killed_and_resumed_is_undisturbed(tmp_path, monkeypatch):
    """At two moments of training, and before three file operations: bit for bit, from the newest whole."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from faults import trials  # its command does it 60 times

    rows = list(trials(tmp_path, kills=2, points=3, ranks=2, seed=1))
    assert len(rows) == 5
    for row in rows:
        assert row["identical"] and row["newest kept"], row
        assert row["exit codes"] in ("-9 1", "1 -9", "-9 -9"), row
        assert row["redone"] <= 4, row  # a checkpoint every 2 steps, one in flight
