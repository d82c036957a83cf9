"""A rank of test_watchdog.py: does what it is told, and ends as a launched script does."""

import ctypes
import multiprocessing
import os
import sys
import time
from pathlib import Path

from limits import HANG_S
from torch.distributed import TCPStore

from speft_ds.comm import watchdog


class Rank:
    """One of `world_size`; what it may be told to do are its methods."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size

    def meet(self, name: str) -> None:
        """Wait for the other ranks, making progress."""
        (self.folder / f"{name}_{self.rank}").touch()
        while len(list(self.folder.glob(f"{name}_*"))) < self.world_size:
            watchdog.heartbeat()
            time.sleep(0.01)

    def work(self, seconds=2 * HANG_S):
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            watchdog.heartbeat("step 7", counts=True)
            time.sleep(0.02)

    def hang(self, steps="0"):
        """Make no progress any more, after some."""
        for step in range(int(steps)):
            watchdog.heartbeat(f"step {step + 1}", counts=True)
        time.sleep(2 * HANG_S)

    def hold_the_interpreter(self):
        ctypes.PyDLL(None).sleep(2 * HANG_S)

    def fork_and_work(self):
        fork = multiprocessing.get_context("fork")
        fork.Process(target=time.sleep, args=(2 * HANG_S,), daemon=True).start()
        (self.folder / "forked").touch()
        self.work()

    def fail(self, text):
        """End as after an exception."""
        watchdog.fail(text)
        os._exit(2)

    def fail_at_a_death(self, text):
        """Have the death of another rank raise an error here."""
        while not (self.folder / "dying").exists():
            watchdog.heartbeat()
            time.sleep(0.005)
        self.fail(text)

    def close(self, seconds="0", lingers="0"):
        """Come to the end of the run after some work, and to that of the process some time later."""
        self.work(seconds)
        watchdog.close()
        time.sleep(float(lingers))
        sys.exit(0)

    def work_then_fail(self, seconds, text):
        self.work(seconds)
        self.fail(text)


def run(folder: Path, rank: int, job: str, nodes: str, timeout_s: float, has_agent: bool, settings: dict):
    """Body of the process; `job`: a method of Rank and its arguments, `name:one:two`."""
    file = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name, seconds in settings.items():
        setattr(watchdog, name, seconds)
    own = Rank(folder, rank, len(nodes))
    if rank == 0 and not has_agent:
        serve(folder)
    while not (folder / "port").exists():
        time.sleep(0.005)
    store = TCPStore("127.0.0.1", int((folder / "port").read_text()), wait_for_workers=False)
    _, pid = watchdog.own_process()
    store.set(f"process/{rank}", str(pid))
    processes = [(node, int(store.get(f"process/{other}"))) for other, node in enumerate(nodes)]
    watchdog.current = watchdog.Watchdog(
        store, rank, processes, timeout_s, lambda: "go on with: --resume", outlives_store=has_agent
    )
    own.meet("ready")
    name, *arguments = job.split(":")
    getattr(own, name)(*arguments)


def serve(folder: Path) -> TCPStore:
    """Serve the store of a run, for the life of the process."""
    servers.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    (folder / "written").write_text(str(servers[0].port))
    (folder / "written").rename(folder / "port")
    return servers[0]


def agent(folder: Path) -> None:
    """Body of torchrun's agent, as far as it matters here."""
    serve(folder)
    time.sleep(2 * HANG_S)


servers: list[TCPStore] = []
