"""Running a study: its runs as processes on this machine, several at a time, or as a SLURM array."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speft_ds.comm.signals import EXIT_STOPPED, SIGNALS
from speft_ds.config.load_recipe import as_override
from speft_ds.io import write_text
from speft_ds.study.results import Result, failed, read_result
from speft_ds.study.runs import Grid, StudyRun
from speft_ds.terminal import duration
from speft_ds.training.checkpoint.resume import IF_ANY
from speft_ds.training.run_dir import LOG

PR_SET_PDEATHSIG = 1  # of Linux
POLL_S = 0.2  # between two looks at the runs
RUNS = "runs"  # the folder of the run folders


@dataclass
class Execution:
    """The runs of a study that are made in one call.

    Attributes:
        folder: the study's.
        results: by key, of runs that have ended.
        left: keys of runs that were stopped before their end.
    """

    grid: Grid
    folder: Path
    results: dict[str, Result]
    left: set[str] = field(default_factory=set)

    def folder_of(self, run: StudyRun) -> Path:
        return self.folder / RUNS / run.name

    def score(self, key: str) -> float | None:
        result = self.results.get(key)
        return result and result.score(self.grid.study.metric)

    def needed(self) -> list[StudyRun]:
        """The runs that are known to be needed, and have not ended."""
        runs = {
            run.key: run
            for setting in self.grid.settings
            for run in self.grid.progress(setting, self.score).runs
        }
        return [run for key, run in runs.items() if key not in self.results and key not in self.left]

    def collect(self) -> None:
        """Take the results of runs that were finished elsewhere, until none of them makes others needed."""
        found = True
        while found:
            ended = [read_result(run, self.folder_of(run)) for run in self.needed()]
            found = {result.key: result for result in ended if result is not None}
            self.results |= found

    def words(self, run: StudyRun) -> list[str]:
        """The recipe and the overrides of a run."""
        return [self.grid.study.recipe, *run.overrides, as_override("output_dir", str(self.folder_of(run)))]

    def make(self, slots: Sequence[dict[str, str]], ranks: int, save: Callable[[], None]) -> None:
        """Make all runs that are needed.

        Asked to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP), it has its runs write a checkpoint and stop, and
        waits for them; the second time, they are killed.

        Args:
            slots: variables of the environment of every run that is made at once with the others.
            ranks: of a run.
            save: called after each run.
        """
        received: list[int] = []
        num_told = 0
        running: dict[subprocess.Popen, tuple[StudyRun, int, float]] = {}
        caught = (*SIGNALS, signal.SIGHUP)
        before = {each: signal.signal(each, lambda number, _: received.append(number)) for each in caught}
        try:
            while True:
                busy = [run.key for run, _, _ in running.values()]
                todo = [] if received else [run for run in self.needed() if run.key not in busy]
                free = set(range(len(slots))) - {slot for _, slot, _ in running.values()}
                for run, slot in zip(todo, free, strict=False):
                    running[self._start(run, slots[slot], ranks)] = run, slot, time.monotonic()
                    print(f"{run.name}: started", flush=True)
                if not running:
                    return
                time.sleep(POLL_S)
                if num_told < len(received):
                    num_told = len(received)
                    for process in running:
                        process.terminate()
                for process in [each for each in running if each.poll() is not None]:
                    run, _, began = running.pop(process)
                    self._end(run, process.returncode, time.monotonic() - began, bool(received))
                    save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, run: StudyRun, slot: dict[str, str], ranks: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "speft_ds.cli.main", "train", *self.words(run)]
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab") as log:
            # Out of reach of the terminal's Ctrl-C: `make` tells the runs.
            return subprocess.Popen(
                [*command, f"--resume={IF_ANY}", "--ranks", str(ranks)],
                env=os.environ | slot,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )

    def _end(self, run: StudyRun, code: int, seconds: float, is_stopping: bool) -> None:
        """Take the result of a run that has ended."""
        folder, took = self.folder_of(run), duration(seconds)
        result = read_result(run, folder) if code == 0 else None
        if result is None and (is_stopping or code == EXIT_STOPPED):
            self.left.add(run.key)
            print(f"{run.name}: stopped after {took}", flush=True)
            return
        self.results[run.key] = result = result or failed(run, folder)
        metric = self.grid.study.metric
        value = result.measures[metric].value if metric in result.measures else None
        came_to = f"failed, see {folder / LOG}" if result.state == "failed" else f"{metric} {value}"
        print(f"{run.name}: {came_to}, {took}", flush=True)


def _stop_with_parent() -> None:
    """In a run's process: to be asked to stop when the study's is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def write_array(execution: Execution) -> tuple[Path, int]:
    """Write a line for launch/slurm/array.sbatch for each run that is needed now; the file, and how many."""
    lines = [shlex.join(execution.words(run)) for run in execution.needed()]
    number = 1
    while (path := execution.folder / f"array-{number}.txt").exists():  # jobs in the queue read the others
        number += 1
    if lines:
        write_text(path, "\n".join(lines) + "\n")
    return path, len(lines)
