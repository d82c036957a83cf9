"""One run writes to a run folder at a time, and whoever dies lets go of it."""

import fcntl
import os
import subprocess
import sys
import threading

import pytest
from limits import HANG_S

from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import UserError
from speft_ds.training import run_dir
from speft_ds.training.run_dir import Lock, wait_for_lock

HOLD = """
import sys, time
from pathlib import Path
from speft_ds.training.run_dir import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes to the folder tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_two_runs_do_not_write_to_one_folder(tmp_path, holder, monkeypatch, capsys, take):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.2)
    with pytest.raises(UserError) as caught:
        take(tmp_path / "run")
    assert caught.value.what == f"another run is writing to {tmp_path / 'run'}"
    assert caught.value.where == str(tmp_path / "run" / ".lock")
    assert capsys.readouterr().out == f"{caught.value.what}: waiting for its end\n"  # once


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_a_killed_run_holds_nothing(tmp_path, holder, take):
    holder.kill()
    holder.wait()
    take(tmp_path / "run")


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_a_run_that_is_just_ending_is_waited_for(tmp_path, holder, monkeypatch, capsys, take):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", HANG_S)
    monkeypatch.setenv("RANK", "1")  # only rank 0 speaks
    threading.Timer(0.3, holder.kill).start()
    take(tmp_path / "run")
    assert holder.wait() == -9 and capsys.readouterr().out == ""


def test_those_who_wait_do_not_hinder_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.2)
    wait_for_lock(tmp_path / "run")  # of a folder that is not there
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # a rank that looks at the same time
        wait_for_lock(tmp_path / "run")
    lock = Lock(tmp_path / "run")  # and nobody keeps what they took
    with pytest.raises(UserError, match="another run is writing"):
        Lock(tmp_path / "run")
    lock.file.close()
    Lock(tmp_path / "run")
