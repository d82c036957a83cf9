"""One rank's failure ends all ranks and is told once: real processes, with real deaths."""

import itertools
import os
import re
import signal
import time

import pytest
from live import server

from speft_ds.comm import watchdog
from unit.comm import watchdog_rank

ADVICE = "go on with: --resume\n"


class Job:
    """Ranks that do what they are told, until they end.

    Args:
        jobs: by rank, see watchdog_rank.py.
        nodes: one letter per rank.
        settings: constants of the modules, by name.
    """

    def __init__(self, folder, jobs, timeout_s=600.0, nodes=None, has_agent=False, **settings):
        self.folder, self.num_ranks = folder, len(jobs)
        settings = {"PULSE_S": 0.05, "TOLD_S": 0.2, **settings}
        shared = (nodes or "a" * len(jobs), timeout_s, has_agent, settings)
        self.processes = [
            server().Process(target=watchdog_rank.run, args=(folder, rank, doing, *shared))
            for rank, doing in enumerate(jobs)
        ]
        if has_agent:
            self.processes.append(server().Process(target=watchdog_rank.agent, args=(folder,)))
        for process in self.processes:
            process.start()
        self.wait_for(*(f"ready_{rank}" for rank in range(len(jobs))))

    def wait_for(self, *names):
        deadline = time.monotonic() + 120
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names}"
            time.sleep(0.01)

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def ended(self, *without):
        """(Exit codes, what was said) by rank, once all but these have ended by themselves."""
        deadline = time.monotonic() + 120
        for rank in range(self.num_ranks):
            if rank not in without:
                self.processes[rank].join(max(0.1, deadline - time.monotonic()))
                assert not self.processes[rank].is_alive(), f"rank {rank} did not end"
        self.kill()
        codes = [process.exitcode for process in self.processes[: self.num_ranks]]
        said = [(self.folder / f"log_{rank}").read_text() for rank in range(self.num_ranks)]
        # Without what the store's client says of a server that is gone, with its stack.
        return codes, [re.sub(r"^\[W\d.*?\n\n", "", text, flags=re.DOTALL | re.MULTILINE) for text in said]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


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


def is_told(said, reporter, what):
    """One rank alone says this first, and the way on last."""
    assert said[reporter].startswith(what) and said[reporter].endswith(ADVICE), said
    return not any(but(reporter, said))


# Deaths


@pytest.mark.parametrize(
    ("world_size", "victim", "settings"),
    [(2, 1, {}), (4, 0, {}), (4, 2, {}), (3, 0, {"has_agent": True}), (3, 1, {"nodes": "abb"})],
)
def test_the_death_of_a_rank_ends_all_within_seconds_and_is_told_once(job, world_size, victim, settings):
    """Were it not for the process table, it would take SILENCE_S or SETTLE_S."""
    ranks = job(*["work"] * world_size, SILENCE_S=600, SETTLE_S=600, **settings)
    ranks.signal(victim, signal.SIGKILL)
    codes, said = ranks.ended()
    assert but(victim, codes) == [1] * (world_size - 1) and codes[victim] == -signal.SIGKILL
    assert is_told(said, 1 if victim == 0 else 0, f"rank {victim} died")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_told_and_not_the_errors_that_it_causes(job, victim):
    """They are heard of first: a process that is ending closes its connections before it has ended."""
    doing = ["fail_at_a_death:connection reset by peer"] * 3
    doing[victim] = "work"
    ranks = job(*doing)
    ranks.signal(victim, signal.SIGSTOP)
    (ranks.folder / "dying").touch()
    time.sleep(0.5)
    ranks.signal(victim, signal.SIGKILL)
    codes, said = ranks.ended()
    assert set(but(victim, codes)) <= {1, 2}
    assert is_told(said, 1 if victim == 0 else 0, f"rank {victim} died")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_heard_of_though_a_process_that_the_rank_forked_lives_on(job, victim):
    """lm-eval's bootstrap forks helpers, which outlive a rank that is out of memory."""
    doing = ["work"] * 2
    doing[victim] = "fork_and_work"
    ranks = job(*doing, SILENCE_S=600)
    ranks.wait_for("forked")
    ranks.signal(victim, signal.SIGKILL)
    codes, said = ranks.ended()
    assert codes[1 - victim] == 1 and is_told(said, 1 - victim, f"rank {victim} died")


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
    codes, said = job("close", "work_then_fail:1:no space left", "close:2").ended()
    assert (codes, said) == ([0, 2, 0], ["", "no space left\n", ""])


# Hangs


def test_a_rank_that_hangs_is_told_with_where_it_stands(job):
    jobs = {}
    for world_size, culprit in [(1, 0), (2, 1), (4, 3)]:
        doing = ["hang:3"] * world_size
        doing[culprit] = "hang:2"
        jobs[culprit] = job(*doing, timeout_s=0.6)
    for culprit, ranks in jobs.items():
        codes, said = ranks.ended()
        what = f"rank {culprit} made no progress for 0.01 minutes (train.timeout_minutes), after: step 2"
        assert is_told(said, culprit, what) and set(codes) == {1}
        assert "in hang\n    time.sleep(600)" in said[culprit]


def test_a_rank_that_hangs_while_the_others_go_on(job):
    codes, said = job("work", "hang", "work", timeout_s=2.5).ended()
    assert codes == [1, 1, 1] and is_told(said, 1, "rank 1 made no progress")


@pytest.mark.parametrize("settings", [{"nodes": "ab"}, {"timeout_s": 3.0, "SETTLE_S": 1.0}])
def test_a_rank_that_is_frozen_gives_no_answer(job, settings):
    """A node of its own is missed at once; on a node that is alive, it is when the others have waited."""
    ranks = job("work" if "nodes" in settings else "hang", "work", SILENCE_S=2.0, **settings)
    ranks.signal(1, signal.SIGSTOP)
    codes, said = ranks.ended(1)
    assert codes[0] == 1 and is_told(said, 0, "no answer from rank 1")


def test_a_frozen_rank_0_is_told_by_rank_1(job):
    ranks = job("work", "work", "work", SILENCE_S=2.0)
    ranks.signal(0, signal.SIGSTOP)
    codes, said = ranks.ended(0)
    assert codes[1:] == [1, 1] and is_told(said, 1, "no answer from rank 0")


def test_a_rank_that_never_lets_go_of_its_interpreter_is_ended(job):
    """A call in C may hold it, and then no thread of ours runs."""
    codes, said = job("work", "hold_the_interpreter", timeout_s=3.0, DEADLOCK_S=0.3).ended()
    assert codes == [1, 1] and is_told([said[0]], 0, "rank 1 died")
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


@pytest.mark.parametrize(
    "doing",
    [
        ["close:4"] * 2,  # progress is no failure however long it takes
        ["close:0:4", "close:3"],  # nor is a rank that has closed: by taking longer, or by making no progress
        ["close:3", "close:0:4", "close"],
    ],
)
def test_nothing_is_wrong(job, doing):
    codes, said = job(*doing, timeout_s=2.5).ended()
    assert set(codes) == {0} and not any(said)


def test_a_job_that_is_suspended_goes_on(job):
    """All its processes at once, as Slurm does it."""
    ranks = job("close:6", "close:6", nodes="ab", timeout_s=4.0, SILENCE_S=4.0)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            ranks.signal(rank, number)
        time.sleep(5 if number == signal.SIGSTOP else 0)
    codes, said = ranks.ended()
    assert (codes, said) == ([0, 0], ["", ""])


def test_the_end_of_the_launcher_is_no_failure(job):
    """Which serves the store: the run stops by itself, with a checkpoint."""
    ranks = job("close:3", "close:3", has_agent=True, timeout_s=1.0, DEADLOCK_S=0.5)
    ranks.signal(2, signal.SIGKILL)
    codes, said = ranks.ended()
    assert (codes, said) == ([0, 0], ["", ""])


def test_without_a_watchdog_nobody_listens():
    watchdog.heartbeat("step 1")
    watchdog.close()
    assert watchdog.fail("an error before the ranks know each other") is False
