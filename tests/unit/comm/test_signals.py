"""Stop requests, by signals and by the end of a launcher, in processes of their own; flags of a step."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from limits import HANG_S

from speft_ds.comm import signals
from speft_ds.config.load_recipe import ROOT

# A rank: says its id and its launchers, then what it was asked, and lives on until it is killed.
START = """
import os, sys, time
from speft_ds.comm import signals
signals.POLL_S = 0.1
signals.watch_signals()
print(os.getpid(), len(signals.launchers()), flush=True)
"""
RANK = f"""{START}
while not signals.stop_reason():
    time.sleep(0.02)
print(signals.stop_reason(), flush=True)
while True:
    time.sleep(0.02)
"""
# Two who never look: one sleeps, one computes where the interpreter does not come by for an hour.
ASLEEP = f"{START}time.sleep(3600)"
IN_C = f"{START}import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
# What starts the program of its other arguments, and waits; the first is for those who look at it.
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[2:]]).wait()
"""


class Started:
    """A rank of a test and what it says; `command` starts it, or its parent. At the end all are killed."""

    def __init__(self, *command, **environment):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        self.rank, self.num_launchers = map(int, self.line().split())

    def line(self):
        return self.process.stdout.readline().rstrip("\n")

    def is_asked(self, number):
        """Send it a signal, and wait until it has heard of it."""
        os.kill(self.rank, number)
        return self.line() == f"received {number.name}"

    def told(self):
        """All that was said on stderr; ends it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.communicate()[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.told()


def started(body, **environment):
    return Started(sys.executable, "-c", body, **environment)


def launched_by(*names):
    """A rank whose parent, and its parent, have these names on their command lines."""
    parents = [word for name in names for word in ("-c", PARENT, name)]
    return Started(sys.executable, *parents, "-c", RANK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request_that_rank_0_tells_once_and_the_process_lives(number):
    with started(RANK) as rank, started(RANK, RANK="1") as other:
        assert rank.is_asked(number) and other.is_asked(number)
        for _ in range(3):
            os.kill(rank.rank, signal.SIGTERM)
            time.sleep(0.05)
        assert rank.process.poll() is None
        lines = rank.told().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"received {number.name}")
        assert other.told() == ""


def test_ctrl_c_after_another_request_is_no_second_one():
    with started(RANK) as rank:
        assert rank.is_asked(signal.SIGTERM)
        os.kill(rank.rank, signal.SIGINT)
        time.sleep(0.3)
        assert rank.process.poll() is None


def test_other_signals_keep_their_meaning():
    with started(RANK) as rank:
        os.kill(rank.rank, signal.SIGHUP)
        assert rank.process.wait(HANG_S) == -signal.SIGHUP


@pytest.mark.parametrize("body", [ASLEEP, IN_C], ids=["asleep", "in C"])
def test_a_request_is_heard_while_the_main_thread_is_busy_and_a_second_ctrl_c_leaves(body):
    with started(body) as rank:
        os.kill(rank.rank, signal.SIGINT)
        assert rank.process.stderr.readline().startswith("received SIGINT")
        assert rank.process.poll() is None
        os.kill(rank.rank, signal.SIGINT)
        assert rank.process.wait(HANG_S) == signals.EXIT_CTRL_C == 130


# Processes that a rank forks: lm-eval's bootstrap does, in a pool that it ends by SIGTERM

FORKS = f"""{START}
import multiprocessing
fork = multiprocessing.get_context("fork")
runs = fork.Event()
helper = fork.Process(target=lambda: [runs.set(), time.sleep(3600)])
helper.start()
runs.wait()
helper.terminate()
helper.join({HANG_S})
print(helper.exitcode, signals.stop_reason(), flush=True)
helper.kill()
"""


def test_a_forked_process_can_be_terminated_and_its_end_is_no_request():
    with started(FORKS) as rank:
        assert rank.line() == f"{-signal.SIGTERM} None"


# Launchers


@pytest.mark.parametrize(
    "names",
    [
        ["deepspeed.launcher.launch"],
        ["torch.distributed.run"],
        ["/usr/bin/deepspeed"],
        # Each starts the next one, the last the ranks.
        ["/usr/bin/speft", "deepspeed", "deepspeed.launcher.launch"],
    ],
)
def test_the_end_of_the_launcher_is_a_request(names):
    with launched_by(*names) as job:
        assert job.num_launchers == len(names)
        job.process.kill()
        assert job.line() == "the launcher has ended"
        assert job.told().startswith("the launcher has ended")


@pytest.mark.parametrize("name", ["", "deepspeedy", "my.deepspeed.launcher.launch.py"])
def test_the_end_of_another_parent_is_not(name):
    with launched_by(name) as job:
        assert job.num_launchers == 0
        job.process.kill()
        job.process.wait()
        time.sleep(0.5)  # five looks
        assert job.told() == ""


def test_a_launcher_is_a_python_program():
    """A shell, or an editor, with the script of the launcher on its command line is none."""
    script = 'python=$1; "$python" -c "$2" & wait'
    with Started("bash", "-c", script, "deepspeed.launcher.launch", sys.executable, RANK) as job:
        assert job.num_launchers == 0


# Flags


@pytest.fixture
def group(monkeypatch):
    """This process as one of three ranks, of whom nobody was asked to stop."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(signals, "_reasons", [])


def test_flags_are_those_of_any_rank_and_all_written_that_of_all(group):
    written = []
    flags = signals.StepFlags(lambda: bool(written), every=5)
    assert flags.local() == [0, 0, 0]
    assert [flags.is_time(done) for done in (4, 5, 10)] == [False, True, True]
    signals._reasons.append("received SIGTERM")
    written.append(True)
    assert flags.local() == [1, 0, 1]
    flags.reduce([0.0, 0.0, 2.0])
    assert not (flags.stop or flags.all_written or flags.is_time(4))
    flags.reduce([1.0, 1.0, 3.0])
    assert flags.stop and flags.all_written and flags.is_time(4)


def test_the_clock_of_rank_0_decides_when_a_checkpoint_is_due(group, monkeypatch):
    flags = signals.StepFlags(lambda: False, every="1min")
    assert flags.local()[1] == 0
    flags.since -= 61
    assert flags.local()[1] == 1
    monkeypatch.setenv("RANK", "1")
    assert flags.local()[1] == 0
    flags.restart()
    monkeypatch.setenv("RANK", "0")
    assert flags.local()[1] == 0
