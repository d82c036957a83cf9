"""A rank of test_lifeline.py: joins, does what its arguments say, and ends as a launched script does.

Arguments: folder, rank, number of ranks, seconds without progress, what to do, settings as NAME=seconds.
"""

import ctypes
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from speft_ds.comm import watchdog

FOREVER_S = 3600
FOLDER, RANK, WORLD_SIZE = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
# Waits for other ranks, as far as its traceback says.
COLLECTIVE = compile(
    "def all_reduce():\n    time.sleep(FOREVER_S)\n", "/lib/torch/distributed/fake.py", "exec"
)
exec(COLLECTIVE)


def work(seconds=FOREVER_S):
    """Make progress."""
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        watchdog.heartbeat("step 7")
        time.sleep(0.02)


def wait(seconds=1.5):
    """Wait for the other ranks, after some progress."""
    work(seconds)
    all_reduce()  # noqa: F821


def hang(seconds=0.0):
    work(seconds)
    time.sleep(FOREVER_S)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(FOREVER_S)


def fork_and_work():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(FOREVER_S,)).start()
    (FOLDER / "forked").touch()
    work()


def fail(text):
    """End as after an exception."""
    watchdog.fail(text)
    os._exit(2)


def fail_at_the_others_death(text):
    """Let the death of another rank raise an error here."""
    while not (FOLDER / "dead").exists():
        time.sleep(0.005)
    fail(text)


def close(seconds=0.0):
    """Come to the end of the run after some work."""
    work(seconds)
    watchdog.close()
    (FOLDER / f"closed_{RANK}").touch()
    sys.exit(0)


def close_and_linger(seconds):
    watchdog.close()
    time.sleep(float(seconds))
    sys.exit(0)


def close_then_fail(text):
    """Fail after rank 0 has come to its end."""
    while not (FOLDER / "closed_0").exists():
        work(0.1)
    fail(text)


def joined():
    """Join the others, by a port that rank 0 leaves in a file."""
    line = watchdog.Watchdog(RANK, WORLD_SIZE, float(sys.argv[4]), lambda: "go on with: --resume")
    file = FOLDER / "port"
    if RANK == 0:
        (FOLDER / "written").write_text(str(line.port))
        (FOLDER / "written").rename(file)
    while not file.exists():
        time.sleep(0.005)
    line.connect("127.0.0.1", int(file.read_text()))
    watchdog.hold(line)
    (FOLDER / f"ready_{RANK}").touch()
    while not all((FOLDER / f"ready_{rank}").exists() for rank in range(WORLD_SIZE)):
        time.sleep(0.005)
    watchdog.heartbeat("start")  # all of them now, however long each took to come up


if __name__ == "__main__":
    for setting in sys.argv[6:]:
        name, _, value = setting.partition("=")
        setattr(watchdog, name, float(value))
    joined()
    job, *argument = sys.argv[5].split(":")
    globals()[job](*argument)
