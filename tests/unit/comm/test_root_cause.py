"""Which of several failures is told, and when."""

import pytest

from speft_ds.comm.watchdog import SETTLE_S, SILENCE_S, Failure, Kind, Pulse, RootCause

A_DEATH, A_HANG = Failure(Kind.DIED, 3, "died"), Failure(Kind.STUCK, 0, "")
AN_ERROR, ANOTHER = Failure(Kind.RAISED, 2, "no such file"), Failure(Kind.RAISED, 1, "connection reset")


class Ranks:
    """Four of them on two nodes, seen at one time after another."""

    def __init__(self, nodes="aabb", heartbeats=(5, 5, 5, 5)):
        self.root_cause = RootCause(list(nodes), timeout_s=60.0)
        self.now_s = 0.0
        self.pulses = [Pulse(0, False, number, f"step {number}") for number in heartbeats]

    def seen(self, *failures, after_s=1.0, silent=(), done=()):
        """The root cause after some time, in which all but the silent ranks showed two pulses more."""
        self.now_s += after_s
        self.pulses = [
            pulse._replace(number=pulse.number + 2 * (rank not in silent), is_done=rank in done)
            for rank, pulse in enumerate(self.pulses)
        ]
        return self.root_cause.pick(list(failures), self.pulses, self.now_s)


def test_no_failure_has_no_cause():
    ranks = Ranks()
    assert [ranks.seen(after_s=100.0) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([AN_ERROR, A_DEATH], A_DEATH),
        ([A_HANG, AN_ERROR], AN_ERROR),
        ([AN_ERROR, ANOTHER], AN_ERROR),
        ([ANOTHER, AN_ERROR], ANOTHER),
    ],
)
def test_what_causes_the_others_is_told_and_of_equals_the_first(failures, cause):
    ranks = Ranks()
    assert ranks.seen(*failures) is None  # the others may have to report something worse
    assert ranks.seen(*failures) == cause


def test_all_who_failed_need_not_be_waited_for():
    failures = [Failure(Kind.RAISED, rank, "no such mask") for rank in range(4)]
    assert Ranks().seen(*failures) == failures[0]


@pytest.mark.parametrize("dies_late", [False, True])
def test_a_rank_that_has_not_looked_around_is_waited_for(dies_late):
    ranks = Ranks()
    for _ in range(3):
        assert ranks.seen(AN_ERROR, silent=[3]) is None
    if dies_late:
        assert ranks.seen(AN_ERROR, A_DEATH, silent=[3]) == A_DEATH and ranks.root_cause.lost == {3}
    else:
        cause = ranks.seen(AN_ERROR, after_s=SETTLE_S, silent=[3])
        assert cause[:2] == AN_ERROR[:2] and cause.text.startswith(AN_ERROR.text) and "rank 3" in cause.text
        assert ranks.root_cause.lost == {3}


def test_a_rank_that_closed_its_connections_and_is_silent_has_died():
    closed = Failure(Kind.RAISED, 0, "RuntimeError: [pair.cc:554] Connection closed by peer [::1]:2")
    ranks = Ranks()
    ranks.seen(closed, silent=[3])
    assert ranks.seen(closed, silent=[3]) is None
    assert ranks.seen(closed, after_s=SETTLE_S, silent=[3])[:2] == (Kind.DIED, 3)
    assert ranks.root_cause.lost == {3}


def test_the_end_of_a_rank_that_is_done_is_no_failure():
    ranks = Ranks()
    assert [ranks.seen(A_DEATH, done=[3], silent=[3]) for _ in range(3)] == [None] * 3
    ranks.seen(A_DEATH, AN_ERROR, done=[3], silent=[3])
    assert ranks.seen(A_DEATH, AN_ERROR, done=[3], silent=[3]) == AN_ERROR


@pytest.mark.parametrize(
    ("heartbeats", "behind", "shown"),
    [((5, 5, 4, 5), 2, "rank 2 "), ((0, 0, 0, 0), 0, "ranks 0, 1, 2, 3 "), ((7, 6, 7, 6), 1, "ranks 1, 3 ")],
)
def test_the_rank_with_the_fewest_heartbeats_is_at_fault(heartbeats, behind, shown):
    """Those who wait for it may well be stuck before it is, after some progress that does not count."""
    ranks = Ranks(heartbeats=heartbeats)
    ranks.seen(A_HANG)
    cause = ranks.seen(A_HANG)
    assert (cause.kind, cause.rank) == (Kind.STUCK, behind)
    assert cause.text.startswith(shown) and f"after: step {heartbeats[behind]}" in cause.text
    assert "1 minutes (train.timeout_minutes)" in cause.text


def test_where_a_rank_is_stuck_one_that_is_silent_is_at_fault():
    ranks = Ranks(heartbeats=(5, 4, 5, 5))
    ranks.seen(A_HANG, silent=[2, 3])
    assert ranks.seen(A_HANG, silent=[2, 3]) is None
    cause = ranks.seen(A_HANG, after_s=SETTLE_S, silent=[2, 3])
    assert (cause.kind, cause.rank) == (Kind.SILENT, 2) and "ranks 2, 3" in cause.text
    assert ranks.root_cause.lost == {2, 3}


def test_a_node_without_a_pulse_is_lost():
    ranks = Ranks()
    ranks.seen()
    assert ranks.seen(after_s=SILENCE_S, silent=[2, 3]) is None
    ranks.seen(silent=[2, 3])
    cause = ranks.seen(silent=[2, 3])
    assert (cause.kind, cause.rank) == (Kind.SILENT, 2) and "ranks 2, 3" in cause.text
    assert ranks.root_cause.lost == {2, 3}


@pytest.mark.parametrize("nodes", ["aabb", "abbb"])
def test_a_rank_without_a_pulse_is_none_while_its_node_has_one(nodes):
    """It holds its interpreter: reading from a slow disk, say."""
    ranks = Ranks(nodes)
    ranks.seen()
    assert [ranks.seen(after_s=SILENCE_S, silent=[3]) for _ in range(3)] == [None] * 3
    assert [ranks.seen(after_s=SILENCE_S, silent=[1, 2], done=[1]) for _ in range(3)] == [None] * 3
