"""What goes wrong in a run ends it on all ranks, soon, with the first cause and the way on: live runs."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny as made
import yaml
from limits import HANG_S
from live import LiveRun, finishes, is_refused, metrics, whole_steps
from tiny import recipe_values

from distributed import rank_hooks

STEPS = 12
SILENT_MINUTES = 0.5  # of a rank that hangs; each stage of these runs takes less, on a busy machine, too

DIES_AFTER_STEP_9 = {0: rank_hooks.dies_after_step_9, 1: rank_hooks.writes_step_8_at_once}


@pytest.fixture
def values(tiny, tmp_path):
    """A recipe; its run folder is tmp_path/run."""
    train = {"steps": STEPS, "checkpoint_every": 2}
    return recipe_values(tiny, train=train, output_dir=str(tmp_path / "run"))


@pytest.fixture
def start(values, tmp_path):
    """start(more arguments, num_ranks, hooks): a live run of the recipe."""
    runs = []

    def begin(*more, num_ranks=2, hooks=None):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
        log = tmp_path / f"log{len(runs)}"
        runs.append(LiveRun(log, ["--recipe", str(tmp_path / "mine.yaml"), *more], num_ranks, hooks))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def ends(run, codes):
    """It ends by itself; returns what it said after its last step, without the libraries' noise."""
    assert run.codes() == codes, run.text()
    lines = [line for line in run.text().splitlines() if not line.startswith(("[W", "[E", "step ", "["))]
    return "\n".join(lines)


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 2), (2, 4)])
def test_a_rank_that_raises(start, tmp_path, rank, num_ranks):
    run = start(num_ranks=num_ranks, hooks={rank: rank_hooks.raises})
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(start, rank):
    run = start(f"train.timeout_minutes={SILENT_MINUTES}", hooks={rank: rank_hooks.hangs})
    said = ends(run, [1, 1])
    assert said.count("train.timeout_minutes") == 1 and f"rank {rank} made no progress" in said, said
    assert "after: step 3" in said and "time.sleep(2 * HANG_S)" in said and "--resume" in said, said


def test_a_rank_that_is_frozen(start):
    """As by a broken network: it cannot even say so."""
    run = start(f"train.timeout_minutes={SILENT_MINUTES}", "train.steps=100_000")
    run.wait_for("step     3/")
    run.signal(signal.SIGSTOP, 1)
    run.processes[0].join(HANG_S)
    assert run.processes[0].exitcode == 1 and "no answer from rank 1" in run.text(), run.text()
    run.signal(signal.SIGKILL, 1)


def test_a_step_that_is_not_finite_is_skipped(start, tmp_path):
    """NaN on one rank in step 3, and an infinite gradient in step 6: nothing moves, on any rank."""
    run = start(hooks={1: rank_hooks.nan_in_step_3, 0: rank_hooks.infinite_gradient_in_step_6})
    assert run.codes() == [0, 0], run.text()
    lines = metrics(tmp_path / "run")
    assert [line["num_skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert lines[2]["loss"] is None and lines[5]["loss"] is not None and lines[5]["grad_norm"] is None
    assert lines[3]["lr"] == lines[2]["lr"] and lines[6]["lr"] == lines[5]["lr"] > lines[7]["lr"]
    assert all(line["loss"] is not None for line in lines[6:])


SCHEDULES = {
    "sft_ag in one step": {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 3, "growth_steps": 1},
    "sft_ma": {"schedule": "drop_grow", "growth": "sft_ma", "update_every": 4},
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_do_not_learn_from_what_is_not_finite(values, start, tmp_path, case):
    values["mask"] |= SCHEDULES[case]
    run = start(hooks={1: rank_hooks.nan_in_step_3})
    assert run.codes() == [0, 0], run.text()
    assert metrics(tmp_path / "run")[-1]["num_skipped"] == 1
    assert ("mask stays after step 3" in run.text()) == (case == "sft_ag in one step")
    assert all(line["loss"] is not None for line in metrics(tmp_path / "run")[3:])


def test_too_many_in_a_row_stop_the_run(start, tmp_path):
    run = start(hooks={1: rank_hooks.nan_from_step_6_on})
    said = ends(run, [2, 2])
    assert "the loss is nan" in said and "3 steps in a row were not finite" in said, said
    assert "Traceback" not in said and "go on with" not in said  # the same steps would fail again
    assert f"the last complete checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_000006'}" in said
    assert said.count("the loss is nan") == 1 and 6 in whole_steps(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options): a file system of its own, as root can mount one."""
    disk, mounted = tmp_path / "disk", []
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if (
            os.geteuid() != 0
            or shutil.which("mount") is None
            or subprocess.run(command, check=False).returncode
        ):
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(disk)
        return disk

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


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
    again = start("--resume", f"train.steps={1000}")
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


# Damage


@pytest.fixture
def stopped(start, tmp_path):
    """The folder of a run that stopped after 9 of its steps, with checkpoints of steps 6 and 8."""
    run = start(hooks=DIES_AFTER_STEP_9)
    run.codes()
    assert whole_steps(tmp_path / "run") == [8, 6], run.text()
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def refuses(run, *parts):
    """It ends with a user error that names these, once."""
    is_refused(run)
    assert all(run.text().count(part) == 1 for part in parts), run.text()


def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(start, stopped, tmp_path):
    newest = stopped / "checkpoints" / "step_000008"
    flip(newest / "part_00001.safetensors")
    refuses(start("--resume", str(newest)), "part_00001.safetensors", "fix:")
    said = finishes(start("--resume"))
    assert str(newest) in said and "step_000006: step 6" in said
    finishes(start(f"output_dir={tmp_path / 'undisturbed'}"))
    assert metrics(stopped) == metrics(tmp_path / "undisturbed")
    files = [folder / "adapter" / "adapter.safetensors" for folder in (stopped, tmp_path / "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_valid_checkpoint_is_an_error(start, stopped):
    for step in (6, 8):
        flip(stopped / "checkpoints" / f"step_{step:06d}" / "part_00000.safetensors")
    refuses(start("--resume"), "fix:")
    assert len(metrics(stopped)) == 9  # and nothing is touched


def test_another_base_and_other_rows_are_refused_whatever_the_user_says(start, stopped, tmp_path):
    made.make_model(tmp_path / "other", seed=9)
    rows = made.make_data(tmp_path / "other", num_rows=40)
    others = {
        "model.name_or_path": (tmp_path / "other", "another base"),
        "data.path": (rows, "training rows"),
    }
    for key, (value, what) in others.items():
        refuses(start("--resume", "--resume-with", f"{key}={value}"), what, "fix:")


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


def test_a_changed_recipe_is_refused_with_its_keys(start, stopped):
    run = start("--resume", "optimizer.lr=0.5", "mask.density=0.1")
    assert set(run.codes()) == {2}
    assert "optimizer.lr: 0.01 " in run.text() and "mask.density: 0.05 " in run.text()
    run = start("--resume", "--resume-with", "optimizer.lr=0.5")
    is_refused(run)
    assert "optimizer.lr: 0.01 " in run.text()


def test_a_run_branches_off_into_a_new_folder(start, stopped, tmp_path):
    run = start("--resume", str(stopped / "checkpoints" / "step_000006"), f"output_dir={tmp_path / 'new'}")
    assert run.codes() == [0, 0], run.text()
    assert len(metrics(tmp_path / "new")) == STEPS and len(metrics(stopped)) == 9
    assert metrics(tmp_path / "new")[:9] == metrics(stopped)


def test_a_port_that_another_run_has_taken(start):
    said = ends(start(num_ranks=1, hooks={0: rank_hooks.port_is_taken}), [2])
    assert "fix: deepspeed --master_port " in said and "Traceback" not in said, said


def test_the_lock_of_a_killed_build_does_not_hold_a_run_up(start, tmp_path):
    run = start("train.steps=1", hooks=dict.fromkeys((0, 1), rank_hooks.stale_build_lock))
    assert run.codes() == [0, 0] and "60 min old: its build was killed" in run.text(), run.text()
