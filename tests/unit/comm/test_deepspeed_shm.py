"""The lock of a build that was killed: waited for while it may be alive, then removed."""

import os
import threading
import time

import pytest
from limits import HANG_S

from speft_ds.comm import deepspeed_shm as shm_op
from speft_ds.comm.deepspeed_shm import lock_age_s, wait_for_build


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    return path


def test_no_build_is_no_wait(tmp_path):
    assert lock_age_s(tmp_path / "none") is None
    wait_for_build(tmp_path / "none")


def test_a_build_that_is_alive_is_waited_for(lock):
    threading.Timer(0.5, lock.unlink).start()
    wait_for_build(lock.parent, stale_s=HANG_S)
    assert not lock.exists()


def test_a_lock_that_was_left_behind_is_removed_and_said_once(lock, capsys):
    os.utime(lock, (time.time() - 3600,) * 2)
    waiting = [threading.Thread(target=wait_for_build, args=(lock.parent,)) for _ in range(4)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(HANG_S)
    assert not lock.exists()
    assert capsys.readouterr().out == f"note: removed {lock}, 60 min old: its build was killed\n"


def test_the_wait_for_a_lock_that_may_be_alive_ends(lock, capsys, monkeypatch):
    ages, there = iter([61.0, 61.5, 62.0, 62.5]), shm_op.lock_age_s
    monkeypatch.setattr(shm_op, "lock_age_s", lambda folder: None if there(folder) is None else next(ages))
    wait_for_build(lock.parent, stale_s=62)
    out = capsys.readouterr().out
    assert out.startswith("waiting for a build") and "note: removed" in out and not lock.exists()
