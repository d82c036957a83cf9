"""The folder of a run: who may write to it, and what is in it when a run starts, goes on or is done.

Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from speft_ds.config.load_recipe import as_override, resolved_yaml
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0, machine_facts, versions
from speft_ds.errors import UserError, shell
from speft_ds.io import open_lock, parse_json, read_json, write_json, write_text

if TYPE_CHECKING:
    from speft_ds.training.trainer import Trainer

RECIPE, FACTS, METRICS, LOCK = "recipe.yaml", "run.json", "metrics.jsonl", ".lock"
LOG = "study.log"  # what a study's run prints
NOT_OF_A_RUN = (LOCK, LOG, "slurm-*", "submit.sbatch", "*.tmp")  # what may lie there before a run starts
LOCK_WAIT_S = 120.0  # for a run that is just ending: it may be writing its last checkpoint


def check_output_dir(recipe: Recipe) -> None:
    """Refuse a run folder that is not empty, or that cannot be written to. Raises UserError."""
    folder = Path(recipe.output_dir)
    where, another = recipe.where("output_dir"), shell(as_override("output_dir", f"{folder}-2"))
    above = (folder, *folder.absolute().parents)
    if dangling := [path for path in above if os.path.islink(path) and not os.path.exists(path)]:
        what = f"the run folder cannot be made: {dangling[0]} is a link to what is not there"
        raise UserError(what, where, f"choose another, or remove the link: {shell('rm', dangling[0])}")
    if os.path.isfile(folder) or has_files(folder):
        ways = [f"choose another, {another}", f"remove this one: {shell('rm', '-r', folder)}"]
        if os.path.isfile(folder / RECIPE):
            ways.insert(0, "go on with the run in it: --resume")
        raise UserError(f"the run folder {folder} is not empty", where, ", or ".join(ways))
    nearest = next(path for path in above if os.path.exists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        what = f"the run folder {folder} cannot be written: no right to write to {nearest}"
        raise UserError(what, where, "output_dir=/a/folder/you/may/write/to")


def has_files(folder: Path) -> bool:
    """Whether there is anything in a folder but what its job script puts there."""
    can_look = os.path.isdir(folder) and os.access(folder, os.R_OK)
    names = os.listdir(folder) if can_look else []
    return any(not any(fnmatch(name, pattern) for pattern in NOT_OF_A_RUN) for name in names)


def start_folder(recipe: Recipe) -> None:
    """Make the run folder, with the resolved recipe in it."""
    write_text(Path(recipe.output_dir) / RECIPE, resolved_yaml(recipe))


def wait_for_lock(folder: Path) -> None:
    """Wait until nobody writes to a run folder. Raises UserError where that takes too long."""
    if os.path.lexists(folder / LOCK):
        with _open_lock(folder, may_make=False) as file:
            _lock(file, fcntl.LOCK_SH, folder)


def is_locked(folder: Path) -> bool:
    """Whether a run is writing to a folder, as far as this machine knows."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


class Lock:
    """Held by rank 0 while its run writes to the folder; the system lets go of it when the process ends."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = _open_lock(folder)
        _lock(self.file, fcntl.LOCK_EX, folder)
        # Held as long as anybody has the file open: a forked helper must not outlive this process' lock.
        os.register_at_fork(after_in_child=self.file.close)


def _open_lock(folder: Path, may_make: bool = True) -> IO:
    try:
        return open_lock(folder / LOCK, may_make)
    except OSError as error:
        fix = f"remove it: {shell('rm', '-r', folder / LOCK)}"
        what = f"the lock of the run folder cannot be opened: {error}"
        raise UserError(what, str(folder / LOCK), fix) from error


def _lock(file: IO, how: int, folder: Path) -> None:
    deadline, told = time.monotonic() + LOCK_WAIT_S, False
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            what = f"another run is writing to {folder}"
        except OSError:  # a file system without locks
            return
        if not told:
            log_rank0(f"{what}: waiting for its end")
        told = True
        if time.monotonic() > deadline:
            fix = "stop the other one, or choose another output_dir"
            raise UserError(what, str(folder / LOCK), fix)
        time.sleep(0.5)


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json; empty where there is none, or it is damaged."""
    try:
        facts = read_json(folder / FACTS)
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    write_json(folder / FACTS, facts)


def rewind_metrics(folder: Path, step: int, source: Path | None = None) -> None:
    """Leave the lines of the steps up to `step` in metrics.jsonl: the others will be written again.

    Args:
        source: the run folder that they are taken from; None: this one.
    Raises:
        UserError: a line of a step before is missing.
    """
    path = (source or folder) / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    kept = []
    for line in text.splitlines(keepends=True):
        values = _values(line)
        if values is None or values["step"] > step:
            break
        kept.append((values["step"], line))
    if [number for number, _ in kept] != list(range(1, step + 1)):
        fix = "resume an older checkpoint by its path, or start anew"
        raise UserError(f"{path} lacks lines of the first {step} steps", str(path), fix)
    write_text(folder / METRICS, "".join(line for _, line in kept))


def _values(line: str) -> dict[str, Any] | None:
    """What a line of metrics.jsonl says; None for one that was cut off."""
    try:
        values = parse_json(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def copy_scores(source: Path, folder: Path) -> None:
    """Take over the scores from before training."""
    for path in (source / "eval").glob("before*"):
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, folder / "eval" / path.name)
        else:
            shutil.copy(path, folder / "eval" / path.name)


def run_facts(trainer: Trainer) -> dict:
    """The contents of run.json, but for what the end of the run adds."""
    from speft_ds.comm import collectives  # late: imports torch
    from speft_ds.model.codecs import base_in_words

    recipe, mask = trainer.recipe, trainer.mask
    return {
        "versions": versions(),
        "machine": {"device": str(collectives.device()), **machine_facts()},
        "world_size": collectives.world_size(),
        "global_batch": recipe.train.global_batch,
        "micro_batch": recipe.train.micro_batch,
        "num_steps": trainer.num_steps,
        "data": trainer.row_counts,
        "mask": {
            "salience": recipe.mask.salience,
            "granularity": recipe.mask.granularity,
            "budget": recipe.mask.budget,
            "schedule": recipe.mask.schedule,
            "layer_gate": recipe.mask.layer_gate,
            "loaded_from": recipe.mask.load,
            "calibration_samples": recipe.mask.calibration_samples,
            **mask.facts(),
            "entries_by_rank": trainer.state.layout.lengths,
            "changes": trainer.schedule.changes,
        },
        "method": recipe.method.name,
        "low_rank": _low_rank_facts(trainer),
        "whole": sum(target.numel for target in trainer.context.whole_of_base.values()),
        "sparse_backends": sorted(set(trainer.gradient.backends.values())),
        "kernels_chosen": _how_chosen(trainer),
        "resources": trainer.resources,
        "base": {
            "name_or_path": recipe.model.name_or_path,
            "fingerprint": trainer.context.fingerprint,
            "fingerprint_bfloat16": trainer.context.fingerprint_bfloat16,
            "stored": base_in_words(
                recipe.model.dtype, recipe.model.base_format, len(trainer.context.quantised)
            ),
        },
        "timings_s": trainer.timings,
    }


def _low_rank_facts(trainer: Trainer) -> dict:
    low_rank = trainer.context.low_rank
    if low_rank is None:
        return {}
    return {"rank": low_rank.config.r, "scaling": low_rank.scaling, "num_elements": low_rank.num_elements}


def _how_chosen(trainer: Trainer) -> dict:
    """By what the sparse backends were chosen: by the recipe, a rule of thumb, or measured costs."""
    costs = trainer.context.costs
    if costs is not None:
        return {"by": "measured costs", "device": costs.device, "sha256": costs.sha256}
    is_auto = trainer.recipe.train.sparse_backend == "auto"
    return {"by": "a rule of thumb" if is_auto else "train.sparse_backend"}
