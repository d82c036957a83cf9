"""Metrics of a run: metrics.jsonl, one console line per step or a progress bar, seconds per stage.

Beside metrics.jsonl: TensorBoard, Weights & Biases or CSV files, by DeepSpeed's monitor. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from speft_ds.comm import watchdog
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0, rank
from speft_ds.errors import UserError
from speft_ds.terminal import duration

# train.monitor -> the section of DeepSpeed's configuration that switches it on.
SECTIONS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
PACKAGES = ("tensorboard", "wandb")  # what is not installed with us, by the name that pip knows
PROJECT = "speft_ds"
LONG_S = 20.0  # from here on, what is left of a run is told


class Timings(dict[str, float]):
    """Stage -> seconds, of all the times that it ran.

    Args:
        synchronize: waits for the device, so that a stage has what it started.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        super().__init__()
        self.synchronize = synchronize

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        watchdog.heartbeat(name)
        try:
            yield
            self.synchronize()  # not after an error, which it might hide
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


class MetricsLog:
    """Writes one JSON line per step to `path` and shows it; silent and fileless where `path` is None.

    Args:
        path: metrics.jsonl of the run, on rank 0; None on the other ranks.
        num_steps: of the run, earlier starts included.
        done: of these, that are in the file already.
        monitor: what else is told of every step.
        then_s: seconds that scoring takes after the steps; None: not known.
    """

    def __init__(
        self,
        path: Path | None,
        num_steps: int,
        done: int = 0,
        monitor: Monitor | None = None,
        then_s: float | None = 0.0,
    ):
        self.num_steps, self.monitor, self.then_s = num_steps, monitor, then_s
        self.timed_step = done + 2  # by which the others are estimated: the first one prepares much
        self.file = path.open("a", encoding="utf-8") if path else None
        self.bar = None
        if path and sys.stderr.isatty():
            from tqdm import tqdm  # late: TQDM_DISABLE counts if it is set before this

            self.bar = tqdm(desc="training", total=num_steps, initial=done, unit="step")

    def log(self, values: dict) -> None:
        """Append one step's values (see `trainer.Trainer.train_step` for the keys)."""
        if self.file is None:
            return
        odd = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        self.file.write(json.dumps(values | dict.fromkeys(odd)) + "\n")
        self.file.flush()
        if self.monitor is not None:
            self.monitor.log(values["step"], values)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", tokens_s=f"{values['tokens_per_s']:.0f}")
            self.bar.update()
        else:
            print(self._line(values), flush=True)
        if values["step"] == self.timed_step:
            left = time_left((self.num_steps - values["step"]) * values["step_ms"] / 1000, self.then_s)
            write = self.bar.write if self.bar is not None else partial(print, flush=True)
            if left:
                write(left)

    def flush(self) -> None:
        """Have all lines on the disk: a checkpoint counts on those of its steps."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def _line(self, values: dict) -> str:
        validation = f"validation {values['validation_loss']:.4f}  " if "validation_loss" in values else ""
        skipped = f"skipped {values['num_skipped']}  " if values["num_skipped"] else ""
        return (
            f"step {values['step']:>5}/{self.num_steps}  loss {values['loss']:.4f}  {validation}{skipped}"
            f"grad_norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
            f"memory {values['peak_memory_gib']:.2f} GiB  {values['tokens_per_s']:.0f} tokens/s  "
            f"{values['step_ms']:.0f} ms"
        )

    def close(self) -> None:
        for part in (self.bar, self.monitor, self.file):
            if part is not None:
                part.close()


def time_left(training_s: float, then_s: float | None) -> str:
    """How long a run will take; empty where that is not worth a line. Arguments as for `MetricsLog`."""
    if training_s + (then_s or 0.0) < LONG_S:
        return ""
    if not then_s:
        return f"about {duration(training_s)} of training left" + (", then scoring" if then_s is None else "")
    parts = f"{duration(training_s)} of training, {duration(then_s)} of scoring"
    return f"about {duration(training_s + then_s)} left: {parts}"


def monitor_problems(recipe: Recipe) -> list[UserError]:
    """What is wrong with `train.monitor`, as far as is known without starting it."""
    name = recipe.train.monitor
    if name not in PACKAGES or importlib.util.find_spec(name) is not None:
        return []
    what = f"train.monitor={name} needs the package {name}, which is not installed"
    return [UserError(what, recipe.where("train.monitor"), f"pip install {name}, or train.monitor=none")]


class Monitor:
    """One event per step, from rank 0 alone; the others, and train.monitor=none, do nothing.

    TensorBoard's files go to `<folder>/tensorboard`, CSV files to `<folder>/csv`, W&B's to `<folder>/wandb`.

    Args:
        recipe: all sections.
        folder: the run folder.
    Raises:
        UserError: on this rank: a package is missing, or the monitor does not start.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        name, self._master = recipe.train.monitor, None
        if problems := monitor_problems(recipe):
            raise problems[0]
        if name == "none" or rank() != 0:
            return
        try:
            self._master = _start(name, recipe.name, folder)
        except Exception as error:  # packages of others: ImportError, OSError, W&B's own
            fix = "train.monitor=none"
            if name == "wandb":
                fix = f"log in with `wandb login`, set WANDB_MODE=offline, or {fix}"
            what = f"train.monitor={name} does not start: {error}"
            raise UserError(what, recipe.where("train.monitor"), fix) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the finite numbers among one step's values; those of a nested dict below its key."""
        events = [(tag, value, step) for tag, value in numbers(values)]
        self._try("write", lambda master: master.write_events(events))

    def close(self) -> None:
        """Write what is still in memory, and end W&B's run."""
        self._try("close", _close)
        self._master = None

    def _try(self, what: str, call: Callable[[Any], None]) -> None:
        """Have the monitor do something; one that fails is left out from then on, and training goes on."""
        if self._master is None:
            return
        try:
            call(self._master)
        except Exception as error:  # packages of others: OSError, W&B's own
            self._master = None
            log_rank0(f"note: the monitor does not {what}, and is left out from here on: {error!r:.300}")


def _close(master: Any) -> None:
    if master.tb_monitor is not None:
        master.tb_monitor.summary_writer.close()
    if master.wandb_monitor is not None:
        import wandb

        wandb.finish()


def numbers(values: dict[str, Any], below: str = "train") -> list[tuple[str, float]]:
    """(tag, number) pairs: `train/loss`, `scores/arc_easy acc`."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, key)
        elif isinstance(value, int | float) and math.isfinite(value) and key != "step":
            found.append((f"{below}/{key}", value))
    return found


def _start(name: str, run: str, folder: Path) -> Any:
    """DeepSpeed's monitor; it has no words for where W&B's files go and how its run is called."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    section: dict[str, Any] = {"enabled": True}
    if name == "wandb":
        section["project"] = PROJECT
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("WANDB_NAME", run)
    else:
        section |= {"output_path": str(folder), "job_name": name}
    return MonitorMaster(get_monitor_config({SECTIONS[name]: section}))
