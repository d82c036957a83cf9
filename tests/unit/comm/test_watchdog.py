"""One rank's failure ends all ranks and is told once: real processes, with real deaths."""

import re
import signal
import time

import pytest
from forked import server
from limits import HANG_S
from live import LiveRun

from speft_ds.comm import watchdog
from unit.comm import watchdog_rank

ADVICE = "go on with: --resume\n"
STUCK_S = 4.0  # without progress; longer than a busy machine takes to give a process its turn


class Job(LiveRun):
    """Ranks that do what they are told, until they end; one process more where there is an agent.

    Args:
        jobs: by rank, see watchdog_rank.py.
        nodes: one letter per rank.
        settings: constants of the module, by name.
    """

    def __init__(self, folder, jobs, timeout_s=HANG_S, nodes=None, has_agent=False, **settings):
        self.folder, self.logs = folder, [folder / f"log_{rank}" for rank in range(len(jobs))]
        settings = {"PULSE_S": 0.05, "TOLD_S": 0.2, **settings}
        shared = (nodes or "a" * len(jobs), timeout_s, has_agent, settings)
        bodies = [(watchdog_rank.run, (folder, rank, doing, *shared)) for rank, doing in enumerate(jobs)]
        bodies += [(watchdog_rank.agent, (folder,))] * has_agent
        self.processes = [server().Process(target=body, args=arguments) for body, arguments in bodies]
        for process in self.processes:
            process.start()
        self.wait_for_files(*(f"ready_{rank}" for rank in range(len(jobs))))

    def text(self):
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait_for_files(self, *names):
        self.until(lambda: all((self.folder / name).exists() for name in names), f"no {names}")

    def ended(self, *without):
        """(Exit codes, what was said) by rank, once all but these have ended by themselves."""
        own = self.processes[: len(self.logs)]
        waited_for = [process for rank, process in enumerate(own) if rank not in without]
        for process in waited_for:
            process.join(HANG_S)
        assert not any(process.is_alive() for process in waited_for), self.text()
        self.kill()
        # Without what the store's client says of a server that is gone, with its stack.
        noise = re.compile(r"^\[W\d.*?\n\n", flags=re.DOTALL | re.MULTILINE)
        return [process.exitcode for process in own], [noise.sub("", log.read_text()) for log in self.logs]


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
def test_the_death_of_a_rank_ends_all_at_once_and_is_told_once(job, world_size, victim, settings):
    """By the process table: a pulse that stops would not be noticed in these tests."""
    ranks = job(*["work"] * world_size, SILENCE_S=2 * HANG_S, SETTLE_S=2 * HANG_S, **settings)
    ranks.signal(signal.SIGKILL, victim)
    codes, said = ranks.ended()
    assert but(victim, codes) == [1] * (world_size - 1) and codes[victim] == -signal.SIGKILL
    assert is_told(said, 1 if victim == 0 else 0, f"rank {victim} died")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_told_and_not_the_errors_that_it_causes(job, victim):
    """They are heard of first: a process that is ending closes its connections before it has ended."""
    doing = ["fail_at_a_death:connection reset by peer"] * 3
    doing[victim] = "work"
    ranks = job(*doing, SILENCE_S=2 * HANG_S, SETTLE_S=2 * HANG_S)
    ranks.signal(signal.SIGSTOP, victim)
    (ranks.folder / "dying").touch()
    time.sleep(0.5)
    ranks.signal(signal.SIGKILL, victim)
    codes, said = ranks.ended()
    assert set(but(victim, codes)) <= {1, 2}
    assert is_told(said, 1 if victim == 0 else 0, f"rank {victim} died")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_heard_of_though_a_process_that_the_rank_forked_lives_on(job, victim):
    """lm-eval's bootstrap forks helpers, which outlive a rank that is out of memory."""
    doing = ["work"] * 2
    doing[victim] = "fork_and_work"
    ranks = job(*doing, SILENCE_S=2 * HANG_S)
    ranks.wait_for_files("forked")
    ranks.signal(signal.SIGKILL, victim)
    codes, said = ranks.ended()
    assert codes[1 - victim] == 1 and is_told(said, 1 - victim, f"rank {victim} died")


# Errors


@pytest.mark.parametrize(
    ("world_size", "culprits"), [(1, [0]), (2, [0]), (4, [3]), (2, [0, 1]), (4, range(4))]
)
def test_an_error_is_told_once_by_its_rank_and_ends_all(job, world_size, culprits):
    text = "rank failed\nat line 3"
    doing = [f"fail:{text}" if rank in culprits else "work" for rank in range(world_size)]
    codes, said = job(*doing).ended()
    assert codes == [2 if rank in culprits else 1 for rank in range(world_size)]
    assert "".join(said[rank] for rank in culprits) == "".join(said) == f"{text}\n"


def test_an_error_after_the_end_of_rank_0_is_told(job):
    codes, said = job("close", "work_then_fail:1:no space left", "close:2").ended()
    assert (codes, said) == ([0, 2, 0], ["", "no space left\n", ""])


# Hangs


@pytest.mark.parametrize(
    ("doing", "culprit"),
    [(["hang:2"], 0), (["hang:3", "hang:2"], 1), (["hang:3"] * 3 + ["hang:2"], 3), (["work", "hang:2"], 1)],
)
def test_a_rank_that_hangs_is_told_with_where_it_stands(job, doing, culprit):
    """It made step 2; the others made step 3 and wait, or go on."""
    codes, said = job(*doing, timeout_s=STUCK_S).ended()
    what = f"rank {culprit} made no progress for {STUCK_S / 60:g} minutes"
    assert is_told(said, culprit, what) and set(codes) == {1}
    assert "train.timeout_minutes" in said[culprit] and "step 2" in said[culprit]
    assert "in hang\n    time.sleep(2 * HANG_S)" in said[culprit]


@pytest.mark.parametrize(
    ("doing", "settings"),
    [
        ("work", {"nodes": "ab", "SILENCE_S": 2.0}),  # its node is missed at once
        ("hang", {"timeout_s": STUCK_S, "SETTLE_S": 1.0}),  # on a node that is alive: when others have waited
    ],
)
def test_a_rank_that_is_frozen_gives_no_answer(job, doing, settings):
    ranks = job(doing, "work", **settings)
    ranks.signal(signal.SIGSTOP, 1)
    codes, said = ranks.ended(1)
    assert codes[0] == 1 and is_told(said, 0, "no answer from rank 1")


def test_a_frozen_rank_0_is_told_by_rank_1(job):
    ranks = job("work", "work", "work", SILENCE_S=2.0)
    ranks.signal(signal.SIGSTOP, 0)
    codes, said = ranks.ended(0)
    assert codes[1:] == [1, 1] and is_told(said, 1, "no answer from rank 0")


def test_a_rank_that_never_lets_go_of_its_interpreter_is_ended(job):
    """A call in C may hold it, and then no thread of ours runs."""
    codes, said = job("work", "hold_the_interpreter", timeout_s=STUCK_S, DEADLOCK_S=0.3).ended()
    assert codes == [1, 1] and is_told(said[:1], 0, "rank 1 died")
    assert "Timeout" in said[1] and "in hold_the_interpreter" in said[1]


# Normal ends


@pytest.mark.parametrize(
    "doing",
    [
        ["close"],
        ["close"] * 4,
        ["close:6"] * 2,  # progress is no failure however long it takes
        ["close:0:6", "close:5"],  # nor is a rank that is done: by staying longer, or by making no progress
        ["close:5", "close:0:6", "close"],
        ["close:0.6", "close:0.3", "close"],
        ["close:0.3", "close", "close:0.6"],
    ],
)
def test_a_normal_end_is_silent_in_any_order(job, doing):
    codes, said = job(*doing, timeout_s=STUCK_S).ended()
    assert set(codes) == {0} and not any(said)


def test_a_job_that_is_suspended_goes_on(job):
    """All its processes at once, as Slurm does it."""
    ranks = job("close:6", "close:6", nodes="ab", timeout_s=4.0, SILENCE_S=4.0)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            ranks.signal(number, rank)
        time.sleep(5 if number == signal.SIGSTOP else 0)
    codes, said = ranks.ended()
    assert (codes, said) == ([0, 0], ["", ""])


def test_the_end_of_the_launcher_is_no_failure(job):
    """Which serves the store: the run stops by itself, with a checkpoint."""
    ranks = job("close:6", "close:6", has_agent=True, timeout_s=STUCK_S, DEADLOCK_S=0.5)
    ranks.signal(signal.SIGKILL, 2)
    codes, said = ranks.ended()
    assert (codes, said) == ([0, 0], ["", ""])


def test_without_a_watchdog_nobody_listens():
    watchdog.heartbeat("step 1")
    watchdog.close()
    assert watchdog.fail("an error before the ranks know each other") is False
