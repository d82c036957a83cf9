"""Checkpoints as folders: which there are, which are complete, which to keep. Imports no torch."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from speft_ds.config.recipe import Recipe
from speft_ds.config.train_config import ADAMW, TrainConfig
from speft_ds.env import log_rank0
from speft_ds.errors import UserError, shell
from speft_ds.io import flush_to_disk, parse_json, read_bytes, sha256_of, write_json, write_text
from speft_ds.untrusted import path_within

FORMAT_VERSION = 3
CHECKPOINTS, MANIFEST, COMPLETE = "checkpoints", "manifest.json", "COMPLETE"
UNFINISHED = "its save did not come to its end"
_NAME = re.compile(r"step_(\d{6,})$")


class PartLine(BaseModel):
    """A part in the manifest."""

    model_config = ConfigDict(strict=True)

    file: str
    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """What readers rely on in manifest.json. Other keys are kept."""

    model_config = ConfigDict(strict=True)

    step: PositiveInt
    run_id: str | None
    world_size: PositiveInt
    parts: list[PartLine]
    recipe: dict
    base: dict
    progress: dict
    state: dict
    validation_loss: float | None = None

    @field_validator("parts")
    @classmethod
    def _one_per_rank(cls, parts: list[PartLine], info: ValidationInfo) -> list[PartLine]:
        expected = [part_name(rank) for rank in range(min(info.data.get("world_size", 0), len(parts) + 1))]
        if [part.file for part in parts] != expected:
            raise ValueError("not one part per rank, in their order")
        return parts


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; `problem` says why it does not count; None: as far as looked at, it does."""

    path: Path
    step: int
    manifest: dict[str, Any]
    problem: str | None = None

    @property
    def validation_loss(self) -> float | None:
        return self.manifest.get("validation_loss")


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step_{step:06d}"


def temporary_of(folder: Path) -> Path:
    """Where a checkpoint is written until all of it is on the disk."""
    return folder.with_name(folder.name + ".tmp")


def part_name(rank: int) -> str:
    return f"part_{rank:05d}.safetensors"


def checkpoint_entry(recipe: Recipe) -> int:
    """Bytes per entry in a checkpoint: index and delta, and what the optimizer keeps of it."""
    optimizer, mask = recipe.optimizer, recipe.mask
    kept = {"sgd": 4 * (optimizer.momentum > 0), "lion": 4, "adamw": 8}.get(optimizer.name, 10)
    if optimizer.name in ADAMW and mask.has_entry_steps:
        kept += 4  # its number of steps
    if "8bit" in optimizer.name and mask.schedule in ("periodic", "drop_grow"):
        kept += 4  # its slot
    return 8 + kept


def num_checkpoints(train: TrainConfig, num_steps: int) -> int:
    """The most checkpoints that are on the disk at a time, the one that is being written included."""
    if train.checkpoint_every is None:
        return 1  # at the end, or where the run is stopped
    at_multiples = num_steps // train.keep_every if train.keep_every else 0
    return train.keep_last + 1 + at_multiples + train.keep_best


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """All checkpoints of a run folder, also those that do not count; newest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step_*") if _NAME.match(path.name)]
    return [inspect(path) for path in sorted(found, key=lambda path: -int(_NAME.match(path.name).group(1)))]


def inspect(path: Path) -> Checkpoint:
    """A checkpoint, checked but for the contents of its parts (see `verify`)."""
    name = _NAME.match(path.name)
    step = int(name.group(1)) if name else -1
    try:
        mark = read_bytes(path / COMPLETE).decode("utf-8").strip()
        text = read_bytes(path / MANIFEST)
        if hashlib.sha256(text).hexdigest() != mark:
            return Checkpoint(path, step, {}, f"{MANIFEST} is damaged: its hash is not the recorded one")
        manifest = parse_json(text)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        why = UNFINISHED if missing == COMPLETE else "it is damaged"
        return Checkpoint(path, step, {}, f"{why}: it has no {missing}")
    except (OSError, ValueError) as error:
        return Checkpoint(path, step, {}, f"not readable: {error}")
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION or type(version) is not int:
        what = f"it has format {version!r:.40}, this version reads {FORMAT_VERSION}"
        return Checkpoint(path, step, {}, what)
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        return Checkpoint(path, step, {}, f"it is damaged: {MANIFEST}: {key!r:.100}: {first['msg']}")
    return Checkpoint(path, manifest["step"], manifest, _problem(path, step, manifest))


def _problem(path: Path, step: int, manifest: dict[str, Any]) -> str | None:
    if step not in (-1, manifest["step"]):
        return f"it is of step {manifest['step']}, not {step}: the folder was renamed"
    for part in manifest["parts"]:
        file = path_within(path, part["file"])
        if not file.is_file():
            return f"it is damaged: {part['file']} is missing"
        if file.stat().st_size != part["bytes"]:
            return f"it is damaged: {part['file']} has {file.stat().st_size} bytes of {part['bytes']}"
    return None


def verify(checkpoint: Checkpoint, first: int = 0, every: int = 1) -> str | None:
    """What is wrong with the contents of the parts number `first`, `first + every` and so on, if anything."""
    for part in checkpoint.manifest["parts"][first::every]:
        try:
            found = sha256_of(checkpoint.path / part["file"])
        except OSError as error:
            return f"{part['file']} is not readable: {error}"
        if found != part["sha256"]:
            return f"it is damaged: the hash of {part['file']} is not the recorded one"
    return None


def publish(temporary: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Turn a folder with all its parts into a checkpoint: manifest, rename, marker, each flushed to disk.

    Raises:
        OSError: it cannot be written; there is no new checkpoint then.
    """
    wanted = {part["file"] for part in manifest["parts"]}
    for stray in [path for path in temporary.iterdir() if path.name not in wanted]:
        stray.unlink()  # of a save that another number of ranks did not finish
    for part in manifest["parts"]:
        file = temporary / part["file"]
        if not file.is_file() or file.stat().st_size != part["bytes"]:
            raise OSError(f"{file} is not what its rank wrote: do all nodes see this folder?")
    write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, **manifest})
    flush_to_disk(temporary)
    if folder.exists():
        remove(folder)  # without a marker: the save of a killed run got as far as the rename
    temporary.rename(folder)
    flush_to_disk(folder.parent)
    write_text(folder / COMPLETE, sha256_of(folder / MANIFEST) + "\n")
    flush_to_disk(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its marker first: half removed it does not count."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def prune(newest: Path, train: TrainConfig) -> None:
    """Remove the checkpoints before the newest that nothing says to keep, and what interrupted saves left.

    Those of other runs, and those of later steps, are no business of ours.

    Args:
        newest: the checkpoint that was just made.
        train: says to keep the newest `keep_last` complete ones, those of multiples of `keep_every` steps
            and, with `keep_best`, that of the lowest validation loss; of equal ones the first.
    """
    made = inspect(newest)
    up_to_it = [c for c in list_checkpoints(newest.parent.parent) if c.step <= made.step]
    ours = [c for c in up_to_it if c.problem or c.manifest["run_id"] == made.manifest["run_id"]]
    valid = [checkpoint for checkpoint in ours if checkpoint.problem is None]
    kept = {newest, *(checkpoint.path for checkpoint in valid[: train.keep_last])}
    if train.keep_every:
        kept |= {checkpoint.path for checkpoint in valid if checkpoint.step % train.keep_every == 0}
    measured = [c for c in valid if c.validation_loss is not None and math.isfinite(c.validation_loss)]
    if train.keep_best and measured:
        kept.add(min(measured, key=lambda checkpoint: (checkpoint.validation_loss, checkpoint.step)).path)
    for checkpoint in ours:
        if checkpoint.path not in kept:
            remove(checkpoint.path)


def clean(run: Path, step: int) -> None:
    """Clear the way for a run that goes on from a step: what interrupted saves left, and damaged checkpoints.

    Later checkpoints are not complete, or the run would go on from them; they are set aside.
    """
    for temporary in (run / CHECKPOINTS).glob("*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)
    for checkpoint in list_checkpoints(run):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(checkpoint.path.name + ".unusable")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.path.rename(aside)
            log_rank0(f"note: {checkpoint.path} is set aside as {aside.name}")


def latest_valid(run: Path, run_id: str | None, below: int | None = None) -> Checkpoint | None:
    """The newest checkpoint of a run that `inspect` finds complete; prints why newer ones are not used.

    Args:
        run_id: of the run; None: not known, any will do.
        below: only of steps before this one; None: of any.
    Returns:
        None where there is no checkpoint at all, and no trace of one.
    Raises:
        UserError: there are checkpoints, and none of them counts.
    """
    problems = []
    for checkpoint in list_checkpoints(run):
        if below is not None and checkpoint.step >= below:
            continue
        problem = checkpoint.problem
        if problem is None and run_id is not None and checkpoint.manifest["run_id"] != run_id:
            problem = "it is of another run"
        if problem is None:
            return checkpoint
        problems.append(problem)
        log_rank0(f"note: checkpoint {checkpoint.path}: {problem}; looking for an older one")
    if below is not None or any(UNFINISHED not in problem for problem in problems):
        fix = f"start anew: another output_dir, or remove this one: {shell('rm', '-r', run)}"
        raise UserError("no complete checkpoint to resume from", str(run / CHECKPOINTS), fix)
    return None
