"""Resuming a run: from which checkpoint, whether the recipe is still the same, and what its folder then has.

Imports no torch, but for what runs on the ranks.
"""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from speft_ds.config.limited_yaml import read_yaml
from speft_ds.config.load_recipe import as_override, load_recipe
from speft_ds.config.recipe import FIELDS, Recipe, resolve
from speft_ds.env import log_rank0, origin, versions, world_size
from speft_ds.errors import UserError, shell
from speft_ds.training import run_dir
from speft_ds.training.checkpoint.folder import (
    CHECKPOINTS,
    Checkpoint,
    clean,
    inspect,
    latest_valid,
    list_checkpoints,
    verify,
)
from speft_ds.training.run_dir import RECIPE, has_files, read_facts

NEWEST, IF_ANY = "newest", "auto"  # what --resume without a path means; and `--resume auto`
# What changes nothing that is learnt, but for the order of sums.
SAFE_TO_CHANGE = {
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.sparse_backend",
    "train.overlap",
    "train.reduce_bucket",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.timeout_minutes",
    "train.monitor",
    "train.max_nonfinite",
    "train.profile",
    "deepspeed.config",
    "deepspeed.keep_unpartitioned",
    "eval.batch_size",
    "output_dir",
}
# Values with which a key keeps what is recorded.
KEEPS_RECORDED = (("model.dtype", "auto"), ("data.date", None))
# What may name the same thing elsewhere, which fingerprints and hashes see, or says what is scored.
NEEDS_FLAG = {
    "model.name_or_path",
    "data.path",
    "data.mixture",
    "data.scorer",
    "mask.load",
    "mask.calibration_path",
    *(key for key in FIELDS if key.startswith("eval.")),
} - SAFE_TO_CHANGE


@dataclass(frozen=True)
class Resume:
    """What `--resume` asks for.

    Attributes:
        asked: NEWEST, IF_ANY, or a path to a checkpoint or a run folder.
        allowed: `key=value` of every --resume-with.
    """

    asked: str
    allowed: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        return None if self.asked in (NEWEST, IF_ANY) else Path(self.asked)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        state: `new`; `resumed`; `finished`: there is nothing to do.
        checkpoint: to go on from; None: from the beginning.
        source: the run folder that it is of.
        is_chosen: the user named this checkpoint: no other will do.
        dtype: of the base in the run that is resumed, which `model.dtype: auto` keeps; None: of a new run.
        date: that chat templates took for today in it; None: of a new run, or they took none.
        damaged: steps of checkpoints that were looked at and passed over.
    """

    state: Literal["new", "resumed", "finished"] = "new"
    checkpoint: Checkpoint | None = None
    source: Path | None = None
    is_chosen: bool = False
    dtype: str | None = None
    date: str | None = None
    damaged: tuple[int, ...] = ()


def run_folder_of(path: Path) -> Path:
    """The run folder that a path names: itself, or the one that the checkpoint lies in. Raises UserError."""
    for folder in (path, path.absolute().parent.parent):
        if (folder / RECIPE).is_file():
            return folder
    fix = f"name a run folder, or a checkpoint in its {CHECKPOINTS}/"
    raise UserError(f"{path} is neither a run folder nor a checkpoint of one", "--resume", fix)


def recipe_to_resume(resume: Resume, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run that is named by its path. Raises UserError."""
    if resume.path is None:
        fix = "name its recipe, too, or its folder: --resume runs/NAME"
        raise UserError("--resume alone does not say which run", "command line", fix)
    folder = run_folder_of(resume.path)
    own = as_override("output_dir", str(folder))
    return load_recipe(str(folder / RECIPE), [own, *overrides, *resume.allowed], name=folder.name)


def find_start(recipe: Recipe, resume: Resume) -> Start:
    """Where the run goes on, going by what is on the disk; the contents of the parts are not looked at.

    Raises:
        UserError: there is nothing to go on from, or the recipe is another one now.
    """
    folder = Path(recipe.output_dir)
    if resume.path is not None and resume.path.absolute() != folder.absolute():
        start = _named(resume.path, folder)
    else:
        start = _newest(folder, resume)
    if start.checkpoint is not None:
        recorded, where = start.checkpoint.manifest["recipe"], start.checkpoint.path
    elif start.source is not None:  # finished, or stopped before its first checkpoint
        where = start.source / RECIPE
        try:
            recorded = read_yaml(where)
        except (OSError, ValueError, yaml.YAMLError) as error:
            fix = f"start anew: another output_dir, or remove this one: {shell('rm', '-r', start.source)}"
            raise UserError(f"not readable as YAML: {error}", str(where), fix) from error
    else:
        return start
    check_unchanged(recorded, recipe, resume.allowed, where)
    return replace(start, dtype=_value(recorded, "model.dtype"), date=_value(recorded, "data.date"))


def _named(path: Path, folder: Path) -> Start:
    """The checkpoint of this path, or the newest one of another run folder."""
    source = run_folder_of(path)
    is_run = source == path
    if is_run:
        checkpoint = latest_valid(source, None)
        if checkpoint is None:
            raise UserError(f"{source} has no checkpoint", "--resume", "start it anew, without --resume")
    else:
        checkpoint = inspect(path)
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}", "--resume", shell("ls", path.parent))
        if checkpoint.problem:
            fix = f"take the newest complete one: {shell('--resume', source)}"
            raise UserError(f"cannot resume from {path}: {checkpoint.problem}", "--resume", fix)
    if source.absolute() != folder.absolute():
        if has_files(folder):
            there = shell(as_override("output_dir", str(source)))
            fix = f"output_dir= a new folder, or {there} to go on there"
            raise UserError(f"the run folder {folder} is not empty", "output_dir", fix)
    elif newer := _complete_after(checkpoint.step, source):
        remove = shell("rm", "-r", *(checkpoint.path for checkpoint in newer))
        fix = f"output_dir= a new folder to branch off, or remove the newer ones: {remove}"
        raise UserError(f"{source} has newer checkpoints than {path.name}", "--resume", fix)
    return Start("resumed", checkpoint, source, is_chosen=not is_run)


def _newest(folder: Path, resume: Resume) -> Start:
    if not has_files(folder):
        if resume.asked == IF_ANY:
            return Start()
        fix = "check output_dir; without --resume it starts (--resume auto: whichever fits)"
        raise UserError(f"there is no run in {folder} to resume", "--resume", fix)
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {RECIPE}", "--resume", "output_dir=...")
    facts = read_facts(folder)
    if facts.get("finished"):
        return Start("finished", source=folder)
    checkpoint = latest_valid(folder, facts.get("run_id"))
    if checkpoint is None:
        if any(begun["step"] for begun in facts.get("starts", [])):
            fix = f"remove it, and branch off again: {shell('rm', '-r', folder)}"
            raise UserError(f"{folder} branched off another run, and has no checkpoint yet", "--resume", fix)
        log_rank0(f"note: {folder} was stopped before its first checkpoint: it starts from the beginning")
    return Start("resumed", checkpoint, folder)


def _complete_after(step: int, run: Path) -> list[Checkpoint]:
    """The checkpoints of later steps that count, newest first."""
    return [c for c in list_checkpoints(run) if c.step > step and c.problem is None]


def last_complete(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that counts."""
    return next(iter(_complete_after(-1, folder)), None)


def resume_hint(folder: Path) -> str:
    """What to type after a failure."""
    last = last_complete(folder)
    if last is None:
        return "there is no checkpoint yet: start again with --resume auto"
    return f"the last complete checkpoint is {last.path}; go on with: {shell('--resume', folder)}"


# The recipe


def check_unchanged(recorded: dict[str, Any], recipe: Recipe, allowed: Sequence[str], where: Path) -> None:
    """Refuse a recipe that is not the one that the checkpoint is of.

    Args:
        recorded: the recipe of the checkpoint, nested, as JSON.
        allowed: `key=value` that the user gave by --resume-with; they are in `recipe` already.
    Raises:
        UserError: lists every key that is another.
    """
    consented = {text.partition("=")[0] for text in allowed}
    now = recipe.model_dump(mode="json")
    refused = {}
    for key in sorted(FIELDS):
        before, after = _value(recorded, key), _value(now, key)
        if before == after or (key, after) in KEEPS_RECORDED:
            continue
        line = f"{key}: {json.dumps(before)} in the run, {json.dumps(after)} now"
        if key not in SAFE_TO_CHANGE and not (key in NEEDS_FLAG and key in consented):
            refused[key] = line
        elif key != "output_dir":
            log_rank0(f"note: resuming with another {line}")
    if not refused:
        return
    lines = "".join(f"\n    {line}" for line in refused.values())
    what = f"the recipe is not that of the run any more: {len(refused)} key(s) differ{lines}"
    back = " ".join(shlex.quote(as_override(key, _value(recorded, key))) for key in refused)
    otherwise = "or start another run, with another output_dir and without --resume"
    if refused.keys() <= NEEDS_FLAG:
        consent = " ".join(f"--resume-with {shlex.quote(as_override(k, _value(now, k)))}" for k in refused)
        otherwise = f"if that is meant: {consent}"
    raise UserError(what, str(where), f"as it was: {back}; {otherwise}")


def _value(recipe: Any, key: str) -> Any:
    """What a nested recipe says; of a key that it is too old to have, the default."""
    *sections, name = key.split(".")
    for section in sections:
        recipe = recipe.get(section) if isinstance(recipe, dict) else None
    is_there = isinstance(recipe, dict) and name in recipe
    field = FIELDS[key]
    return recipe[name] if is_there else None if field.is_required() else field.get_default()


def fit_micro_batch(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with a micro-batch that another number of ranks can share; what is learnt stays the same."""
    fitting = resolve(recipe, job="train", world_size=world_size, fits_micro_batch=True)
    before, now = recipe.train.micro_batch, fitting.train.micro_batch
    if now != before:
        log_rank0(f"note: for {world_size} rank(s) train.micro_batch={now} (it was {before})")
    return fitting


# On the ranks


def verified_start(start: Start) -> Start:
    """The start with a checkpoint whose parts are what was written: the ranks read all of them.

    A damaged one is said so, and the next older one is taken, unless the user named it.

    Raises:
        UserError: on every rank, where there is no complete one.
    """
    from speft_ds.comm import collectives  # late: both import torch
    from speft_ds.training.checkpoint.parts import header_problem

    rank, world_size = collectives.rank(), collectives.world_size()
    while start.checkpoint is not None:
        parts = [start.checkpoint.path / part["file"] for part in start.checkpoint.manifest["parts"]]
        own = verify(start.checkpoint, rank, world_size)
        own = own or next(filter(None, map(header_problem, parts[rank::world_size])), None)
        problems = [problem for problem in collectives.all_gather_objects(own) if problem]
        if not problems:
            return start
        if start.is_chosen:
            fix = f"take the newest complete one: {shell('--resume', start.source)}"
            raise UserError(f"cannot resume: {problems[0]}", str(start.checkpoint.path), fix)
        log_rank0(f"note: checkpoint {start.checkpoint.path}: {problems[0]}; looking for an older one")
        run_id, step = start.checkpoint.manifest["run_id"], start.checkpoint.step
        older = collectives.run_on_rank0(partial(latest_valid, start.source, run_id, below=step))
        older = collectives.broadcast_object(older)
        start = replace(start, checkpoint=older, damaged=(*start.damaged, step))
    return start


def open_folder(recipe: Recipe, start: Start) -> run_dir.Lock:
    """Make the run folder ours, and what is in it what a run has at this step. On rank 0.

    Raises:
        UserError: another job is writing there, or has meanwhile taken the run on.
    """
    folder = Path(recipe.output_dir)
    lock = run_dir.Lock(folder)
    if start.state == "new":
        run_dir.check_output_dir(recipe)
    forked = start.source is not None and start.source.absolute() != folder.absolute()
    step = start.checkpoint.step if start.checkpoint else 0
    if not start.is_chosen and not forked and start.state == "resumed":
        others = [c for c in _complete_after(step, folder) if c.step not in start.damaged]
        later = [checkpoint for checkpoint in others if verify(checkpoint) is None]
        if later:
            what = f"another job has taken the run on to {later[0].path} while this one was starting"
            raise UserError(what, str(folder), "the same command once more")
    clean(folder, step)
    if start.state == "resumed":
        run_dir.rewind_metrics(folder, step, start.source)
    if forked:
        run_dir.copy_scores(start.source, folder)
    run_dir.start_folder(recipe)
    before = {} if forked else read_facts(folder)
    starts = [*before.get("starts", []), {"step": step, "world_size": world_size(), **origin()}]
    own_id = start.checkpoint.manifest["run_id"] if start.checkpoint and not forked else uuid.uuid4().hex
    facts = {"run_id": before.get("run_id") or own_id, "finished": False, "template_date": recipe.data.date}
    facts |= {"recipe": before.get("recipe") or recipe.name, "starts": starts, "versions": versions()}
    run_dir.write_facts(folder, facts)
    return lock
