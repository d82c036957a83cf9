"""The end of all ranks at the failure of one, with the root cause told once.

Without it, the other ranks wait in a collective for a rank that has died, or raise errors of their own that
hide the first one. A thread of every rank reports to the run's TCPStore what it sees: a process of its node
died; its own main thread raised an error, or makes no progress. Rank 0 picks the root cause, and all leave.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from speft_ds.untrusted import printable

if TYPE_CHECKING:
    from torch.distributed import Store

PULSE_S = 0.5
SILENCE_S = 30.0  # a node without a pulse for so long is lost
SETTLE_S = 10.0  # from a failure to the choice of the root cause, where a rank shows no pulse meanwhile
TOLD_S = 2.0  # to tell the root cause in, before the exit of other ranks ends the job
FAREWELL_S = 10.0  # for rank 0, which serves the store, to outlive those who read there how the run ended
DEADLOCK_S = 20.0  # past the timeout: a main thread that never lets go of the interpreter
EXIT_FAILURE = 1
PULSE, FAILURES, END = "pulse of rank {}", "failures", "end"  # keys of the store

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


def died(rank: int) -> Failure:
    return Failure(Kind.DIED, rank, f"rank {rank} died; killed, or out of memory: see the log of its node")


def silent(ranks: Iterable[int]) -> Failure:
    text = f"no answer from {_named(ranks)}: frozen, or cut off from the network"
    return Failure(Kind.SILENT, min(ranks), text)


def _named(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


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
        failures = [failure for failure in failures if failure.rank in running]  # the others ended in peace
        gone = self._silent_nodes(running, now_s)
        failures += [silent(gone)._replace(rank=rank) for rank in gone]
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
        if not unheard:
            return self._furthest_behind(running) if cause.kind == Kind.STUCK else cause
        if cause.kind == Kind.STUCK:
            return silent(unheard)
        if cause.kind == Kind.RAISED and _has_lost_a_peer(cause.text):
            return died(min(unheard))
        return cause._replace(text=f"{cause.text}\n{silent(unheard).text}")

    def _furthest_behind(self, running: set[int]) -> Failure:
        """The rank with the fewest heartbeats: the others wait for it, whoever reported first."""
        fewest = min(self.pulses[rank].heartbeats for rank in running)
        behind = [rank for rank in sorted(running) if self.pulses[rank].heartbeats == fewest]
        limit = f"{self.timeout_s / 60:g} minutes (train.timeout_minutes)"
        text = f"{_named(behind)} made no progress for {limit}, after: {self.pulses[behind[0]].where}"
        return Failure(Kind.STUCK, behind[0], text)

    def _silent_nodes(self, running: set[int], now_s: float) -> set[int]:
        """The ranks of nodes without a pulse. One rank of several may hold its interpreter for long."""
        without = {rank for rank in running if now_s - self.grown_s[rank] > SILENCE_S}
        alive = {self.nodes[rank] for rank in running - without}
        return {rank for rank in without if self.nodes[rank] not in alive}


def _has_lost_a_peer(error: str) -> bool:
    """Whether a rank on another node ended its connections: gloo and NCCL notice before the node can tell."""
    return any(f"connection {how} by peer" in error.lower() for how in ("closed", "reset"))


class Watchdog:
    """This rank's end of it.

    Args:
        store: a client of the run's store, for this object alone.
        processes: `own_process()` of every rank.
        timeout_s: without a heartbeat for so long, this rank is stuck.
        advice: how to go on after a failure.
        outlives_store: the store is the launcher's, whose end is a request to stop: see `signals`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        processes: list[tuple[str, int]],
        timeout_s: float,
        advice: Callable[[], str],
        outlives_store: bool = False,
    ):
        self.store, self.rank, self.world_size = store, rank, len(processes)
        self.timeout_s, self.advice, self.outlives_store = timeout_s, advice, outlives_store
        self.number, self.is_done, self.heartbeats, self.where = 0, False, 0, "start"  # see Pulse
        # Seconds without those in which the job was suspended, and nobody could show a pulse.
        self.now_s = self.heartbeat_s = 0.0
        self.root_cause: Failure | None = None
        self.of_all = RootCause([node for node, _ in processes], timeout_s)  # used by rank 0
        self.reported: set[int] = set()  # ranks whose failure this one has reported
        self.is_failing, self.ended = False, threading.Event()
        self.processes: dict[int, int] = {}  # file descriptor of another process of this node -> rank
        for other, (node, pid) in enumerate(processes):
            if node == processes[rank][0] and other != rank:
                with contextlib.suppress(OSError):  # it is dead by now, or the kernel is too old
                    self.processes[os.pidfd_open(pid)] = other
        self._show_pulse()
        self._postpone_exit()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True).start()

    def _watch(self) -> None:
        looked_at, has_ended = time.monotonic(), False
        while not has_ended:
            time.sleep(PULSE_S)
            now = time.monotonic()
            self.now_s += min(now - looked_at, 4 * PULSE_S)
            looked_at = now
            try:
                has_ended = self._exchange()
            except RuntimeError:
                return self._lose_store(died(0))
            if self.root_cause is not None:
                return self._end(self.root_cause)
        self.ended.set()

    def _exchange(self) -> bool:
        """Report what is wrong here, then show a pulse, then look how the run goes; whether it has ended."""
        dead, is_done = self._dead(), self.is_done
        if 0 in dead and not is_done:
            self.root_cause = died(0)
            return True
        for rank in dead:
            self.report(died(rank))
        if self.now_s - self.heartbeat_s > self.timeout_s:
            self.report(Failure(Kind.STUCK, self.rank, ""))
        self._show_pulse()
        if self.rank == 0:
            return self._lead(is_done)
        if not is_done and self.store.check([END]):
            end = json.loads(self.store.get(END))
            self.is_done, self.root_cause = True, Failure(*end) if end else None
        return is_done

    def _lead(self, is_done: bool) -> bool:
        """On rank 0: pick a root cause, or say that the run is done; whether all others know how it ended."""
        lines = self.store.get(FAILURES).splitlines() if self.store.check([FAILURES]) else []
        values = self.store.multi_get([PULSE.format(rank) for rank in range(self.world_size)])
        pulses = [Pulse(*json.loads(value)) for value in values]
        if self.root_cause is None and not is_done:
            failures = [Failure(*json.loads(line)) for line in lines]
            self.root_cause = self.of_all.pick(failures, pulses, self.now_s)
        if self.root_cause is not None or is_done:
            self.store.set(END, json.dumps(self.root_cause))
        others = set(range(1, self.world_size)) - self.of_all.lost
        return is_done and all(pulses[rank].is_done for rank in others)

    def _end(self, cause: Failure) -> None:
        """Leave, once one rank has told the root cause."""
        self.root_cause = cause
        # Rank 0 has picked it, unless it is lost itself, and its store with it.
        is_rank_0_lost = cause.is_loss and cause.rank == 0
        if self.rank == (int(is_rank_0_lost) if cause.is_loss else cause.rank):
            self._tell(cause)
        else:
            time.sleep(TOLD_S)
        self.is_done, deadline = True, time.monotonic() + FAREWELL_S
        with contextlib.suppress(RuntimeError):
            while not is_rank_0_lost and not self._exchange() and time.monotonic() < deadline:
                time.sleep(PULSE_S / 5)
        self.ended.set()
        if not self.is_failing:  # else the main thread leaves, with its own exit code
            os._exit(EXIT_FAILURE)

    def _tell(self, cause: Failure) -> None:
        text = cause.text
        if cause.kind == Kind.STUCK:
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
            text += f"; rank {self.rank} stands at\n{''.join(stack[-4:]).rstrip()}"
        print(printable(text), file=sys.stderr, flush=True)
        if cause.kind != Kind.RAISED:
            with contextlib.suppress(Exception):  # it looks into folders
                print(self.advice(), file=sys.stderr, flush=True)

    def _watch_store(self) -> None:
        """Notice a store that gives no answer: its client would wait for ever."""
        number, waited_s = -1, 0.0
        while not self.ended.wait(PULSE_S):
            self._postpone_exit()
            waited_s = waited_s + PULSE_S if self.number == number else 0.0
            number = self.number
            if waited_s > 4 * PULSE_S and 0 in self._dead():  # a process that it forked holds its connections
                self._lose_store(died(0))
            elif waited_s > SILENCE_S:
                self._lose_store(silent([0]))
        faulthandler.cancel_dump_traceback_later()

    def _lose_store(self, cause: Failure) -> None:
        """Rank 0 is gone, or else the launcher."""
        if not self.is_done and not self.outlives_store:
            self._end(cause)
        self.ended.set()

    def _postpone_exit(self) -> None:
        """In C, without the interpreter: the last resort where no thread of ours can run."""
        faulthandler.dump_traceback_later(self.timeout_s + DEADLOCK_S, exit=True)

    def _dead(self) -> set[int]:
        """The ranks of this node whose processes have ended."""
        poll = select.poll()
        for process in self.processes:
            poll.register(process, select.POLLIN)
        return {self.processes[process] for process, _ in poll.poll(0)}

    def _show_pulse(self) -> None:
        self.number += 1
        pulse = Pulse(self.number, self.is_done, self.heartbeats, self.where)
        self.store.set(PULSE.format(self.rank), json.dumps(pulse))

    def report(self, failure: Failure) -> None:
        if failure.rank not in self.reported:
            self.reported.add(failure.rank)
            self.store.append(FAILURES, json.dumps(failure) + "\n")


def own_process() -> tuple[str, int]:
    """(node, process id) of this process. Processes of one node see each other's ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid()


current: Watchdog | None = None  # that of this process; without it, the functions below do nothing


def heartbeat(where: str | None = None, counts: bool = False) -> None:
    """This rank makes progress.

    Args:
        where: for the message if this was the last time; None: where it was.
        counts: all ranks make this call, equally often: who made it less often is waited for.
    """
    if current is not None:
        current.heartbeat_s, current.where = current.now_s, where or current.where
        current.heartbeats += counts


def close() -> None:
    """The run is done: that processes end is no failure any more. Rank 0 waits for the others."""
    if current is not None:
        current.is_done = True
        current.thread.join(FAREWELL_S)
        current.ended.set()


def fail(text: str) -> bool:
    """Report an error of this rank, which prints it if it is the root cause; returns when all is told.

    Returns:
        False without a watchdog: nothing is printed then.
    """
    if current is None:
        return False
    current.is_failing = True
    with contextlib.suppress(RuntimeError):  # the store is gone, as the thread will see
        current.report(Failure(Kind.RAISED, current.rank, text))
    if not current.ended.wait(SILENCE_S + SETTLE_S + FAREWELL_S) or current.root_cause is None:
        print(printable(text), file=sys.stderr, flush=True)
    return True
