"""Failures of ranks, and the one that caused the others. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

SILENCE_S = 30.0  # a node without a pulse for so long is lost
SETTLE_S = 10.0  # from a failure to the choice of the root cause, where a rank shows no pulse meanwhile

Kind = IntEnum("Kind", "DIED RAISED SILENT STUCK")  # each may cause those after it


class Failure(NamedTuple):
    """What went wrong on a rank."""

    kind: Kind
    rank: int
    text: str

    @property
    def is_loss(self) -> bool:
        """Whether the rank itself can neither tell nor hear of it."""
        return self.kind in (Kind.DIED, Kind.SILENT)


class Pulse(NamedTuple):
    """What a rank shows twice a second, after it has reported what is wrong."""

    number: int  # grows while the thread runs
    is_done: bool  # the rank knows how the run ended
    heartbeats: int  # of those that all ranks make: how far its main thread came
    where: str


class RootCause:
    """What rank 0 knows of all ranks, and how it picks the failure that is told.

    Args:
        nodes: by rank.
        timeout_s: `train.timeout_minutes`, for the message.
    Attributes:
        lost: ranks that will not hear of the root cause.
    """

    def __init__(self, nodes: list[str], timeout_s: float):
        self.nodes, self.timeout_s = nodes, timeout_s
        self.pulses: list[Pulse | None] = [None] * len(nodes)
        self.grown_s = [0.0] * len(nodes)  # when each pulse last grew
        self.alarm: tuple[float, list[Pulse]] | None = None  # when the first failure was heard of
        self.lost: set[int] = set()

    def pick(self, failures: list[Failure], pulses: list[Pulse], now_s: float) -> Failure | None:
        """The root cause, once every rank has failed, or has looked around since the first failure.

        Args:
            failures: in the order in which they were reported.
            pulses: by rank, read after the failures.
        """
        for rank, pulse in enumerate(pulses):
            if pulse != self.pulses[rank]:
                self.grown_s[rank] = now_s
        self.pulses = pulses
        running = {rank for rank, pulse in enumerate(pulses) if not pulse.is_done}
        gone = self._silent_nodes(running, now_s)
        failures = [failure for failure in failures if failure.rank in running]  # the others ended in peace
        failures += [Failure(Kind.SILENT, rank, no_answer(gone)) for rank in gone]
        if not failures:
            return None
        self.alarm = self.alarm or (now_s, pulses)
        since_s, before = self.alarm
        waiting = running - {failure.rank for failure in failures} - {0}
        unheard = {rank for rank in waiting if pulses[rank].number < before[rank].number + 2}
        if unheard and now_s - since_s < SETTLE_S:
            return None
        self.lost = unheard | {failure.rank for failure in failures if failure.is_loss}
        cause = min(failures, key=lambda failure: failure.kind)  # of the same kind, the first
        if cause.kind == Kind.RAISED and unheard and _has_lost_a_peer(cause.text):
            return Failure(Kind.DIED, min(unheard), died(min(unheard)))
        if cause.kind != Kind.STUCK:
            return cause._replace(text=f"{cause.text}\n{no_answer(unheard)}") if unheard else cause
        if unheard:
            return Failure(Kind.SILENT, min(unheard), no_answer(unheard))
        # The others wait for the rank with the fewest heartbeats, whoever reported first.
        fewest = min(pulses[rank].heartbeats for rank in running)
        behind = [rank for rank in running if pulses[rank].heartbeats == fewest]
        limit = f"{self.timeout_s / 60:g} minutes (train.timeout_minutes)"
        text = f"{_ranks(behind)} made no progress for {limit}, after: {pulses[min(behind)].where}"
        return Failure(Kind.STUCK, min(behind), text)

    def _silent_nodes(self, running: set[int], now_s: float) -> set[int]:
        """The ranks of nodes without a pulse. One rank of several may hold its interpreter for long."""
        silent = {rank for rank in running if now_s - self.grown_s[rank] > SILENCE_S}
        alive = {self.nodes[rank] for rank in running - silent}
        return {rank for rank in silent if self.nodes[rank] not in alive}


def _has_lost_a_peer(error: str) -> bool:
    """Whether a rank on another node ended its connections: gloo and NCCL notice before the node can tell."""
    return any(f"connection {how} by peer" in error.lower() for how in ("closed", "reset"))


def died(rank: int) -> str:
    return f"rank {rank} died; killed, or out of memory: see the log of its node"


def no_answer(ranks: Iterable[int]) -> str:
    return f"no answer from {_ranks(ranks)}: frozen, or cut off from the network"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
