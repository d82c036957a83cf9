"""One rank's trouble ends all ranks, with the first cause told once.

Without it, the other ranks wait in a collective for a rank that has died, or raise errors of their own that
hide the first one. Every rank holds a connection to rank 0, which the system closes however a process ends.
A thread of each rank listens; rank 0 decides which trouble was the first, and tells all.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

GRACE_S = 1.5  # between the first report and the verdict: a death and the errors that it causes come together
SILENCE_S = 10.0  # after which a rank that says nothing while all others wait counts as hanging
TOLD_S = 2.0  # for the rank at fault to say what happened, before the others' exit ends the job
DEADLOCK_S = 20.0  # past the timeout: this process holds its interpreter and cannot even report
CONNECT_S = 60.0
EXIT_FAILURE = 1


@dataclass(order=True)
class Failure:
    """What a rank reports. Sorted by how likely it is the cause of the others."""

    kind: int  # DIED, RAISED, HANGS or WAITS
    order: int  # of its arrival
    rank: int
    text: str = field(compare=False)


DIED, RAISED, HANGS, WAITS = range(4)
# Where a rank waits for the others: for weights that are on their way, and for a sum beside a backward.
COLLECTIVES = ("torch/distributed", "deepspeed/comm", "deepspeed/runtime/zero/part", "wait_for_ranks")


class Watchdog:
    """This rank's end of it.

    Args:
        rank, world_size: of this process.
        timeout_s: without a `beat` for so long, this rank is in trouble.
        advice: how to go on after a failure.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, advice: Callable[[], str]):
        self.rank, self.world_size, self.timeout_s, self.advice = rank, world_size, timeout_s, advice
        self.server = _open_server(world_size) if rank == 0 else None
        self.peers: dict[socket.socket, int] = {}  # on rank 0: connection -> rank
        self.to_rank_0: socket.socket | None = None
        self.troubles: list[Failure] = []
        self.first_at: float | None = None  # when rank 0 heard of the first
        self.verdict: Failure | None = None
        self.decided = threading.Event()
        self.teller = 0  # the rank that tells; 1 where rank 0 is dead or gives no answer
        self.closing = self.failing = False  # this rank is done; or its main thread is in `fail`
        self.lock = threading.Lock()
        self.main_thread = threading.main_thread().ident

    @property
    def port(self) -> int:
        """Of rank 0's end, for the other ranks."""
        return self.server.getsockname()[1]

    def connect(self, host: str, port: int) -> None:
        """Join; every rank calls this once, after rank 0 has told its port."""
        if self.rank == 0:
            self.server.settimeout(CONNECT_S)
            while len(self.peers) < self.world_size - 1:
                peer, _ = self.server.accept()
                _keep_alive(peer)
                peer.settimeout(CONNECT_S)
                with contextlib.suppress(ValueError, KeyError, OSError):  # a stranger at the door
                    self.peers[peer] = json.loads(_read_line(peer))["rank"]
                    peer.settimeout(None)
        else:
            self.to_rank_0 = socket.create_connection((host, port), timeout=CONNECT_S)
            self.to_rank_0.settimeout(None)
            _keep_alive(self.to_rank_0)
            self._send(self.to_rank_0, {"rank": self.rank})
        self.beat("start")
        # The system closes a connection with its last holder: a forked helper must not outlive this rank's.
        os.register_at_fork(after_in_child=self._let_go)
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def _let_go(self) -> None:
        for end in [*self.peers, self.to_rank_0, self.server]:
            if end is not None:
                end.close()

    def heartbeat(self, where: str) -> None:
        """This rank makes progress; `where` it is, for the message if this was the last time."""
        self.where, self.last_beat = where, time.monotonic()
        # In C, and without the interpreter: the last resort against a collective that never lets go of it.
        faulthandler.dump_traceback_later(self.timeout_s + DEADLOCK_S, exit=True)

    def close(self) -> None:
        """The run is done on this rank: that its connection ends is no trouble."""
        self.closing = True
        if self.server is not None:
            self.server.close()
        faulthandler.cancel_dump_traceback_later()
        for peer in [*self.peers, *([self.to_rank_0] if self.to_rank_0 else [])]:
            self._send(peer, {"closed": True})

    def fail(self, text: str) -> None:
        """Report an error of this rank, and print it if it is the first cause; returns when all is told."""
        self.failing = True
        self._report(RAISED, text)
        self.decided.wait(GRACE_S + 2 * SILENCE_S)
        if self.verdict is None or self.verdict.rank == self.rank:
            print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(TOLD_S)

    def _report(self, kind: int, text: str) -> None:
        if self.rank == 0:
            self._hear(kind, 0, text)
        else:
            self._send(self.to_rank_0, {"kind": kind, "text": text})

    def _hear(self, kind: int, rank: int, text: str) -> None:
        with self.lock:
            self.first_at = self.first_at or time.monotonic()
            self.troubles.append(Failure(kind, len(self.troubles), rank, text))

    def _listen(self) -> None:
        ends = selectors.DefaultSelector()
        for peer in [*self.peers, *([self.to_rank_0] if self.to_rank_0 else [])]:
            ends.register(peer, selectors.EVENT_READ)
        reported_at = None
        while self.verdict is None and not self.closing:
            for key, _ in ends.select(timeout=0.25):
                if not self._receive(key.fileobj):
                    ends.unregister(key.fileobj)
            now = time.monotonic()
            if reported_at is None and now - self.last_beat > self.timeout_s:
                reported_at = now
                self._report(*self._stuck())
            if self.first_at is not None and now - self.first_at > GRACE_S:
                self._decide(is_last_call=now - self.first_at > SILENCE_S)
            if self.rank != 0 and reported_at is not None and now - reported_at > GRACE_S + 2 * SILENCE_S:
                self._give_up_rank_0(HANGS, f"rank 0 gives no answer\n{self._stuck()[1]}")
        if self.verdict is not None:
            self._end()

    def _receive(self, peer: socket.socket) -> bool:
        """Read a line from the other end; False where there will be none any more."""
        try:
            line = _read_line(peer)
        except OSError:
            line = ""
        message = json.loads(line) if line else None
        if message is not None and "closed" in message:
            return False
        if self.rank == 0:
            rank = self.peers[peer]
            if message is None and not self.closing:
                self._hear(DIED, rank, f"rank {rank} died")
            elif message is not None:
                self._hear(message["kind"], rank, message["text"])
        elif message is not None:
            self.verdict = Failure(message["kind"], 0, message["rank"], message["text"])
        elif not self.closing:
            self._give_up_rank_0(DIED, "rank 0 died")
        return message is not None

    def _decide(self, is_last_call: bool) -> None:
        """On rank 0: the first cause, told to all; not yet, where all who spoke only wait for others."""
        with self.lock:
            first = min(self.troubles)
            silent = set(range(self.world_size)) - {trouble.rank for trouble in self.troubles}
        if first.kind == WAITS and silent:
            if not is_last_call:
                return
            ranks = ", ".join(map(str, sorted(silent)))
            first = Failure(HANGS, 0, min(silent), f"rank {ranks} gives no answer\n{first.text}")
        for peer in self.peers:
            self._send(peer, {"kind": first.kind, "rank": first.rank, "text": first.text})
        self.verdict = first

    def _give_up_rank_0(self, kind: int, text: str) -> None:
        self.verdict, self.teller = Failure(kind, 0, 0, text), 1

    def _stuck(self) -> tuple[int, str]:
        """What this rank does instead of making progress."""
        stack = traceback.format_stack(sys._current_frames()[self.main_thread])
        waits = any(name in "".join(stack[-4:]) for name in COLLECTIVES)
        text = (
            f"rank {self.rank} made no progress for {self.timeout_s / 60:g} minutes "
            f"(train.timeout_minutes), after: {self.where}; it stands at\n{''.join(stack[-4:])}"
        )
        return (WAITS if waits else HANGS), text.rstrip()

    def _end(self) -> None:
        """Leave, after the rank at fault has had its say."""
        verdict = self.verdict
        self.decided.set()
        try:
            if verdict.kind != RAISED and self.rank == self.teller:
                died = "; killed, or out of memory: see the log of its node" if verdict.kind == DIED else ""
                print(f"{verdict.text}{died}", file=sys.stderr, flush=True)
                print(self.advice(), file=sys.stderr, flush=True)
        finally:  # whatever becomes of the advice, which looks into folders
            if not self.failing:  # else the main thread leaves, with its own exit code
                time.sleep(TOLD_S)
                os._exit(EXIT_FAILURE)

    @staticmethod
    def _send(peer: socket.socket, message: dict) -> None:
        with contextlib.suppress(OSError):  # an end that is gone is heard of by reading
            peer.sendall(json.dumps(message).encode() + b"\n")


def _open_server(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _read_line(peer: socket.socket) -> str:
    """A line from a connection; empty where it is closed. Lines are read one byte a time: there are few."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = peer.recv(1)
        if not piece:
            return ""
        line += piece
    return line.decode()


def _keep_alive(peer: socket.socket) -> None:
    """Have the system look for a machine that is gone: after 10 s of silence, every 5 s, 4 times."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


_current: Watchdog | None = None


def hold(lifeline: Watchdog) -> None:
    """Make this the lifeline of the process."""
    global _current
    _current = lifeline


def heartbeat(where: str) -> None:
    """This rank makes progress; without a lifeline nobody listens."""
    if _current is not None:
        _current.beat(where)


def close() -> None:
    """The run is done on this rank."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def fail(text: str) -> bool:
    """Tell of an error of this rank if it is the first cause on any rank; False without a lifeline."""
    if _current is None:
        return False
    _current.fail(text)
    return True
