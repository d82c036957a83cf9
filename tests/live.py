"""Live runs for tests: the real command on real ranks, in processes that can be killed at any moment."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from forked import server
from limits import HANG_S

from speft_ds.env import free_port, rank_env
from speft_ds.training.checkpoint.folder import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
SPEFT = "speft_ds/cli/main.py"  # the `speft` command


def _run(
    script: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    log: Path,
    hook: Callable | None = None,
) -> None:
    """Body of a process: a script of the repository with these arguments."""
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(ROOT / script), *arguments]
    import torch

    torch.set_num_threads(1)
    if hook is not None:
        hook()
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_script(
    script: str, arguments: Sequence[str], folder: Path, hook: Callable | None = None, **environment: str
) -> tuple[int, str]:
    """The exit code of a script of the repository, started in this folder, and all that it printed.

    Args:
        hook: what the process calls before (picklable).
    """
    log = folder / f"{time.monotonic_ns()}.log"
    process = server().Process(target=_run, args=(script, list(arguments), environment, folder, log, hook))
    process.start()
    process.join(HANG_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{script} did not end:\n{log.read_text()}")
    return process.exitcode, log.read_text()


class LiveRun:
    """A started run.

    Args:
        arguments: of `launch/<job>.py`.
        hooks: rank -> what it calls before it starts (picklable).
        folder: where it is started; default: here. environment: what its ranks have besides.
    Attributes:
        processes: by rank; log: what all of them print.
    """

    def __init__(
        self,
        log: Path,
        arguments: Sequence[str],
        num_ranks: int = 2,
        hooks: dict[int, Callable] | None = None,
        job: str = "train",
        folder: Path | None = None,
        **environment: str,
    ):
        self.log = log
        port, shared = free_port(), {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        script, words, where = f"launch/{job}.py", list(arguments), folder or Path.cwd()
        self.processes = []
        for rank in range(num_ranks):
            own = shared | rank_env(rank, num_ranks, port)
            body = (script, words, own, where, log, (hooks or {}).get(rank))
            self.processes.append(server().Process(target=_run, args=body, daemon=True))
        for process in self.processes:
            process.start()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        """Until the run has printed this."""
        self.until(lambda: text in self.text(), f"no {text!r}")

    def until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + HANG_S
        while not is_done():
            alive = any(process.is_alive() for process in self.processes)
            if not alive or time.monotonic() > deadline:
                if is_done():
                    return
                self.kill()
                raise AssertionError(f"{what} in\n{self.text()}")
            time.sleep(0.01)

    def signal(self, number: int, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.codes()

    def codes(self) -> list[int]:
        """Exit codes by rank, once all have ended."""
        deadline = time.monotonic() + HANG_S
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                raise AssertionError(f"a rank did not end:\n{self.text()}")
        return [process.exitcode for process in self.processes]


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what is measured by a clock."""
    clocked = {"tokens_per_s", "step_ms", "peak_memory_gib"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def whole_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that count, newest first."""
    return [checkpoint.step for checkpoint in list_checkpoints(run) if checkpoint.problem is None]


def finishes(run: LiveRun) -> str:
    """It ends well; returns what it printed."""
    assert set(run.codes()) == {0}, run.text()
    return run.text()


def is_refused(run: LiveRun) -> None:
    """It ends on every rank with the code of a user error; with 1 where another rank was first to say so."""
    codes = run.codes()
    assert 2 in codes and set(codes) <= {1, 2} and "Traceback" not in run.text(), run.text()
