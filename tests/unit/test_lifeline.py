"""One rank's trouble ends all ranks and is told once: real processes, with real deaths."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import HANG_S

from speft_ds.comm import watchdog

SCRIPT = Path(__file__).with_name("lifeline_rank.py")
# Shorter than in a run, and as far apart as a busy machine takes to give a process its turn, and more.
SETTINGS = {"GRACE_S": 1.0, "TOLD_S": 0.2, "SILENCE_S": 1.5}
STUCK_S = 3.0  # without progress
ADVICE = "\ngo on with: --resume\n"
DIED = "died; killed, or out of memory: see the log of its node"


class Job:
    """Ranks that do what they are told, until they end; `jobs`: by rank, see lifeline_rank.py."""

    def __init__(self, folder, jobs, timeout_s=HANG_S, **settings):
        self.folder = folder
        more = [f"{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
        self.ranks = []
        for rank, job in enumerate(jobs):
            command = [sys.executable, SCRIPT, folder, rank, len(jobs), timeout_s, job, *more]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.ranks.append(subprocess.Popen([*map(str, command)], start_new_session=True, **pipes))
        self.wait_for(*(f"ready_{rank}" for rank in range(len(jobs))))

    def wait_for(self, *names):
        deadline = time.monotonic() + HANG_S
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names}"
            time.sleep(0.01)

    def signal(self, rank, number):
        os.kill(self.ranks[rank].pid, number)
        if number == signal.SIGKILL:
            self.ranks[rank].wait()
            (self.folder / "dead").touch()

    def ended(self, *without):
        """(Exit codes, what was said) by rank, of all but these, once they have ended by themselves."""
        deadline = time.monotonic() + HANG_S
        for rank, process in enumerate(self.ranks):
            if rank not in without:
                process.wait(max(0.1, deadline - time.monotonic()))
        self.kill()
        said = [process.communicate() for process in self.ranks]
        assert all(out == "" for out, _ in said)
        return [process.returncode for process in self.ranks], [error for _, error in said]

    def kill(self):
        for process in self.ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.wait()


@pytest.fixture
def job(tmp_path):
    """Start a job; it is killed after the test."""
    jobs = []

    def start(*ranks, **settings):
        folder = tmp_path / f"job {len(jobs)}"
        folder.mkdir()
        jobs.append(Job(folder, ranks, **settings))
        return jobs[-1]

    yield start
    for started in jobs:
        started.kill()


def but(rank, values):
    return [value for number, value in enumerate(values) if number != rank]


# Deaths


@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (4, 0), (4, 2)])
def test_the_death_of_a_rank_ends_all_and_is_told_once(job, world_size, victim):
    ranks = job(*["work"] * world_size)
    ranks.signal(victim, signal.SIGKILL)
    codes, said = ranks.ended()
    assert but(victim, codes) == [1] * (world_size - 1) and codes[victim] == -signal.SIGKILL
    teller = 1 if victim == 0 else 0
    assert said[teller] == f"rank {victim} {DIED}{ADVICE}" and not any(but(teller, said))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_told_and_not_the_errors_that_it_causes(job, victim):
    doing = ["fail_at_the_others_death:connection reset by peer"] * 3
    doing[victim] = "work"
    ranks = job(*doing)
    ranks.signal(victim, signal.SIGKILL)
    codes, said = ranks.ended()
    assert all(code in (1, 2) for code in but(victim, codes))
    teller = 1 if victim == 0 else 0
    assert said[teller] == f"rank {victim} {DIED}{ADVICE}" and not any(but(teller, said))


def test_a_death_is_told_though_the_errors_that_it_causes_are_heard_of_first(job):
    ranks = job(*["fail_at_the_others_death:connection reset by peer"] * 2, "work", GRACE_S=5.0)
    (ranks.folder / "dead").touch()
    time.sleep(0.3)
    ranks.signal(2, signal.SIGKILL)
    _, said = ranks.ended()
    assert said == [f"rank 2 {DIED}{ADVICE}", "", ""]


def test_a_death_is_heard_of_though_a_process_that_the_rank_forked_lives_on(job):
    """lm-eval's bootstrap forks helpers, which outlive a rank that is out of memory."""
    ranks = job("work", "fork_and_work")
    ranks.wait_for("forked")
    ranks.signal(1, signal.SIGKILL)
    codes, said = ranks.ended()
    assert codes[0] == 1 and said[0] == f"rank 1 {DIED}{ADVICE}"


# Errors


@pytest.mark.parametrize(("world_size", "culprit"), [(1, 0), (2, 0), (4, 3)])
def test_an_error_is_told_by_its_rank_and_ends_the_others_silently(job, world_size, culprit):
    doing = ["work"] * world_size
    doing[culprit] = "fail:rank failed\nat line 3"
    codes, said = job(*doing).ended()
    assert said[culprit] == "rank failed\nat line 3\n" and not any(but(culprit, said))
    assert codes[culprit] == 2 and but(culprit, codes) == [1] * (world_size - 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_error_of_all_ranks_is_told_once(job, world_size):
    codes, said = job(*["fail:no such mask"] * world_size).ended()
    assert "".join(said) == "no such mask\n"
    assert codes == [2] * world_size


def test_an_error_after_the_end_of_rank_0_is_told(job):
    codes, said = job("close", "close_then_fail:no space left", "close:1").ended()
    assert (codes, said) == ([0, 2, 0], ["", "no space left\n", ""])


# Hangs


def test_a_rank_that_hangs_is_told_with_where_it_stands(job):
    jobs = {}
    for world_size, culprit in [(1, 0), (2, 1), (4, 3)]:
        doing = ["wait"] * world_size
        doing[culprit] = "hang"
        jobs[culprit] = job(*doing, timeout_s=STUCK_S, GRACE_S=2.0)
    for culprit, ranks in jobs.items():
        codes, (said, *silent) = ranks.ended()
        assert set(codes) == {1} and not any(silent)
        what = f"rank {culprit} made no progress for {STUCK_S / 60:g} minutes (train.timeout_minutes)"
        assert said.startswith(f"{what}, after: start; it stands at\n  File ") and said.endswith(ADVICE)
        assert "in hang\n    time.sleep(FOREVER_S)" in said and "all_reduce" not in said


def test_a_rank_that_hangs_while_the_others_go_on(job):
    codes, said = job("work", "hang", "work", timeout_s=STUCK_S).ended()
    assert codes == [1, 1, 1] and said[0].startswith("rank 1 made no progress") and not any(said[1:])


def test_who_hangs_is_told_though_those_who_wait_for_it_are_heard_of_first(job):
    codes, said = job("wait:0", "hang:1.5", "wait:0", timeout_s=STUCK_S, GRACE_S=4.0).ended()
    assert codes == [1, 1, 1] and said[0].startswith("rank 1 made no progress") and not any(said[1:])


def test_where_all_wait_one_tells(job):
    codes, said = job("wait", "wait", "wait", timeout_s=STUCK_S).ended()
    assert codes == [1, 1, 1] and not any(said[1:])
    assert said[0].count("made no progress") == 1 and "in all_reduce" in said[0]


def test_a_rank_that_is_frozen_gives_no_answer(job, stopped=2):
    ranks = job("wait", "wait", "wait", timeout_s=STUCK_S, GRACE_S=3.0)
    ranks.signal(stopped, signal.SIGSTOP)
    codes, said = ranks.ended(stopped)
    assert but(stopped, codes) == [1, 1] and not any(said[1:])
    assert said[0].startswith(f"rank {stopped} gives no answer\nrank ") and "in all_reduce" in said[0]
    assert said[0].endswith(ADVICE)


def test_a_frozen_rank_0_is_told_by_rank_1(job):
    ranks = job("work", "wait", "wait", timeout_s=STUCK_S)
    ranks.signal(0, signal.SIGSTOP)
    codes, said = ranks.ended(0)
    assert codes[1:] == [1, 1] and said[0] == said[2] == ""
    assert said[1].startswith("rank 0 gives no answer\nrank 1 made no progress") and said[1].endswith(ADVICE)


def test_a_rank_that_never_lets_go_of_its_interpreter_is_ended(job):
    """A collective in C may hold it, and then no thread of ours runs."""
    codes, said = job("work", "hold_the_interpreter", timeout_s=STUCK_S, DEADLOCK_S=1.5).ended()
    assert codes == [1, 1] and said[0] == f"rank 1 {DIED}{ADVICE}"
    assert "Timeout" in said[1] and "in hold_the_interpreter" in said[1]


# Normal ends


def test_a_normal_end_is_silent_in_any_order(job):
    orders = itertools.permutations(range(3))
    for ranks in [job(*[f"close:{0.15 * place}" for place in order]) for order in orders]:
        codes, said = ranks.ended()
        assert (codes, said) == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_end_together_end_silently(job, world_size):
    codes, said = job(*["close"] * world_size).ended()
    assert codes == [0] * world_size and not any(said)


def test_who_has_closed_is_not_in_trouble(job):
    """Neither by taking longer than the others, nor by making no progress any more."""
    codes, said = job("close_and_linger:5", "close:4", "close", timeout_s=STUCK_S).ended()
    assert (codes, said) == ([0, 0, 0], ["", "", ""])


def test_progress_is_no_trouble_however_long_it_takes(job):
    codes, said = job("close:5", "close:5", timeout_s=STUCK_S).ended()
    assert (codes, said) == ([0, 0], ["", ""])


def test_without_a_lifeline_nobody_listens():
    watchdog.heartbeat("step 1")
    watchdog.close()
    assert watchdog.fail("an error before the ranks know each other") is False
