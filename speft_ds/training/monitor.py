"""Metrics to TensorBoard, Weights & Biases or CSV files beside metrics.jsonl, by DeepSpeed's own monitor."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError

# train.monitor -> the section of DeepSpeed's configuration that switches it on.
SECTIONS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
PACKAGES = ("tensorboard", "wandb")  # what is not installed with us, by the name that pip knows
PROJECT = "speft_ds"


def monitor_problems(recipe: Recipe) -> list[UserError]:
    """What is wrong with `train.monitor`, as far as is known without starting it. Imports no torch."""
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
        self.name, self._master = recipe.train.monitor, None
        if self.name == "none":
            return
        if problems := monitor_problems(recipe):
            raise problems[0]
        from speft_ds.comm import collectives  # late: the checks above need no torch

        if collectives.rank() != 0:
            return
        try:
            self._master = _start(self.name, recipe.name, folder)
        except Exception as error:  # packages of others: ImportError, OSError, W&B's own
            fix = "train.monitor=none"
            if self.name == "wandb":
                fix = f"log in with `wandb login`, set WANDB_MODE=offline, or {fix}"
            what = f"train.monitor={self.name} does not start: {error}"
            raise UserError(what, recipe.where("train.monitor"), fix) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the finite numbers among one step's values; those of a nested dict below its key."""
        if self._master is not None:
            self._master.write_events([(tag, value, step) for tag, value in numbers(values)])

    def close(self) -> None:
        """Write what is still in memory, and end W&B's run."""
        master, self._master = self._master, None
        if master is None:
            return
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
