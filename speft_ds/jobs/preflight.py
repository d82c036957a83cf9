"""Every check of a recipe before its ranks start: what can be known of its files without torch."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from speft_ds import hub
from speft_ds.config.check_model import model_problems
from speft_ds.config.data_config import Source
from speft_ds.config.deepspeed_config import batch_problems, read_ds_config
from speft_ds.config.mask_config import ScoredOnWeights, mask_file
from speft_ds.config.recipe import FIELDS, Job, Recipe
from speft_ds.data.bad_rows import BadRows
from speft_ds.data.formats import check_row
from speft_ds.data.readers import SUFFIXES, kind_of, unknown_kind
from speft_ds.data.sources import is_hub_dataset, is_pattern, is_saved, iterate_rows, keys_without_effect
from speft_ds.env import CACHE, expand_path
from speft_ds.errors import RecipeError, UserError, shell
from speft_ds.evaluation.task_files import task_file_problems
from speft_ds.training.metrics import monitor_problems

Problems = list[UserError]
NUM_CHECKED = 5  # rows of a source


def check_inputs(recipe: Recipe, job: Job, world_size: int) -> None:
    """Run every check, as far as the job needs what it looks at. Raises RecipeError: all the problems."""
    problems = [problem for check in CHECKS.values() for problem in check(recipe, job, world_size)]
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")


def resolve_offline(recipe: Recipe) -> str | None:
    """Where the hub gives no answer, have its libraries use their cache alone; returns what to tell the user.

    They would retry for minutes.
    """
    data = recipe.data
    names = [recipe.model.name_or_path, data.scorer, recipe.mask.calibration_path, recipe.eval.validation]
    names += [source.path for source in data.sources]
    has_tasks = bool(recipe.eval.tasks or recipe.eval.forgetting_tasks)
    may_ask = has_tasks or any(name and is_hub_dataset(name) for name in names)
    if not may_ask or hub.is_offline_by_choice() or hub.is_reachable():
        return None
    hub.go_offline()
    return f"note: {hub.why_unreachable()}: what is in the hub's cache is used as it is (HF_HUB_OFFLINE=1)"


def _right_path(path: str, key: str) -> str:
    if Path(path).is_relative_to(expand_path(CACHE)):
        return "run `speft quickstart --prepare-only`, which makes it"
    return f"type {key}=/the/right/path"


def check_model(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """The folder or the hub id of the model, and what its config.json tells."""
    name = recipe.model.name_or_path
    problems = _model_problems(recipe, "model.name_or_path", name)
    folder = hub.model_folder(name)
    if problems or folder is None:
        return problems
    return model_problems(recipe, folder / "config.json", job != "evaluate")


def _model_problems(recipe: Recipe, key: str, name: str) -> Problems:
    where, fix = recipe.where(key), _right_path(name, key)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            return [UserError(f"the model folder {name} has no config.json", where, fix)]
        if missing := hub.missing_weights(Path(name)):
            more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
            what = f"the model folder {name} lacks {', '.join(missing[:3])}{more}"
            return [UserError(what, where, f"download or copy it again; {fix}")]
        return []
    if name[0] in "/.~" or name.count("/") != 1:
        hint = "" if name[0] in "/.~" else "; a hub id is owner/name"
        return [UserError(f"no model folder {name}", where, fix + hint)]
    folder = hub.model_folder(name)
    if (folder and not hub.missing_weights(folder)) or hub.is_reachable():
        return []  # whether it exists, is for the hub to say
    return [hub.cannot_fetch(f"the model {name}", where, hub.model_hint(name, key))]


def check_data(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """The rows that the job reads: to train on, to calibrate on, to validate on."""
    data, mask = recipe.data, recipe.mask
    reads_data = job == "train" or (recipe.needs_calibration and mask.calibration_path is None)
    if job == "evaluate":
        return []
    problems = []
    if job == "train" and not data.sources:
        fix = f"type data.path=/the/right/path  ({FIELDS['data.path'].description})"
        problems.append(UserError("data.path is missing", recipe.where("data.path"), fix))
    elif reads_data and not data.sources:
        what = f"mask.salience={mask.salience} needs calibration data, and the recipe names none"
        others = ", ".join(get_args(ScoredOnWeights))
        fix = f"set data.path or mask.calibration_path, or a metric without data: {others}"
        problems.append(UserError(what, recipe.where("mask.salience"), fix))
    if reads_data and data.scorer is not None:
        problems += _model_problems(recipe, "data.scorer", data.scorer)
    if reads_data:
        problems += check_training_rows(recipe)
    others = {"mask.calibration_path": mask.calibration_path if recipe.needs_calibration else None}
    if job == "train" and data.sources:
        others["eval.validation"] = recipe.eval.validation
    for key, path in others.items():
        if path is not None:
            problems += _source_problems(recipe, key, data.of_file(path).sources[0], recipe.where(key))
    return problems


def check_training_rows(recipe: Recipe) -> Problems:
    """Each source of the training rows, going by its first ones."""
    problems, unused = [], [keys_without_effect(source) for source in recipe.data.sources]
    for number, source in enumerate(recipe.data.sources):
        own = recipe.data if recipe.data.mixture is None else recipe.data.mixture[number]
        for key in unused[number]:
            if getattr(own, key) is not None:
                section = "data" if recipe.data.mixture is None else f"data.mixture[{number}]"
            elif number == 0 and all(key in keys for keys in unused):  # of the section, and no source's
                section = "data"
            else:
                continue
            name, reset = f"{section}.{key}", "data.split=train" if key == "split" else f"data.{key}=null"
            what = f"{name} has no effect: {source.path} has no such parts or versions to choose from"
            fix = reset if section == "data" else "remove it"
            problems.append(UserError(what, recipe.where(name), fix))
        problems += _source_problems(recipe, "data.path", source, recipe.where_rows(number))
    return problems


def _source_problems(recipe: Recipe, key: str, source: Source, where: str) -> Problems:
    """What is wrong with a source of rows, going by the first ones; `key` of the recipe names it."""
    path, fix = Path(source.path), _right_path(source.path, key)
    if is_hub_dataset(source.path):
        if hub.has_dataset(source.path) or hub.is_reachable():
            return []
        return [hub.cannot_fetch(f"the data set {path}", where, hub.dataset_hint(source.path))]
    has_several = path.is_dir() or is_pattern(source.path)
    if path.is_dir() and not is_saved(source.path) and not any(kind_of(file) for file in path.rglob("*")):
        return [UserError(f"the folder {path} has no file of rows ({', '.join(SUFFIXES)})", where, fix)]
    if not has_several and not kind_of(path):
        return [unknown_kind(path, where)]
    if not has_several and not path.is_file():
        return [UserError(f"no data file {path}", where, fix)]
    bad, columns, number = BadRows(), "", 0
    try:
        for number, (place, row) in enumerate(iterate_rows(source, bad), 1):
            if number > NUM_CHECKED and not bad.errors:
                break  # else all of them are read, to be counted
            try:
                check_row(row, place, source)
            except UserError as error:
                columns = columns or (
                    ", ".join(map(str, row)) if isinstance(row, dict) else "a list of objects"
                )
                bad.add(error)
        bad.check()
    except UserError as error:
        if columns and key != "data.path" and recipe.data.sources:
            fix = f"data.columns holds for the training rows too: rename this file's ({columns})"
            return [UserError(error.what, error.where, fix)]
        # What concerns all of it is a matter of the recipe's key; else the file and line are named.
        is_of_all = has_several and error.where == source.path
        return [UserError(error.what, where, error.fix) if is_of_all else error]
    return [] if number else [UserError(f"{path} has no rows", where, fix)]


def check_mask(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """The file of a saved mask; a score has no use for one, and an evaluation does not read it."""
    path, where, method = recipe.mask.load, recipe.where("mask.load"), recipe.method
    if job == "score" and not method.has_mask:
        what = f"method.name={method.name} has no mask to score"
        return [UserError(what, recipe.where("method.name"), "method.name=sparse")]
    if path is None or job == "evaluate":
        return []
    if job == "score":
        what = "mask.load leaves nothing to score: it is a finished mask"
        return [UserError(what, where, "mask.load=null")]
    try:
        mask_file(path, where)
    except UserError as error:
        return [error]
    return []


def check_method(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """What the method needs beside this package."""
    if job != "train" or not recipe.method.has_lora or find_spec("peft") is not None:
        return []
    what = f"method.name={recipe.method.name} needs the package peft, which is not installed"
    fix = f"{shell('pip', 'install', 'speft_ds[peft]')}, or method.name=sparse"
    return [UserError(what, recipe.where("method.name"), fix)]


def check_tasks(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """The files that tasks are read from, and where metrics go.

    A finished run may be scored on other tasks when the files of its own are gone: for an evaluation, only
    what the command line names is looked for here, and lm-eval says what it misses.
    """
    if job == "score":
        return []
    section = recipe.eval
    named = [
        ("eval.include_path", section.include_path, "task folder", os.path.isdir),
        ("eval.data_dir", section.data_dir, "data folder", os.path.isdir),
        ("eval.forgetting_text", section.forgetting_text, "text file", os.path.isfile),
    ]
    missing = [
        UserError(f"no {what} {path}", recipe.where(key), _right_path(path, key))
        for key, path, what, is_there in named
        if path is not None and not is_there(path)
        if job == "train" or recipe.where(key).startswith("command line")
    ]
    if section.include_path is not None and not missing:
        missing += task_file_problems(Path(section.include_path))
    return missing + (monitor_problems(recipe) if job == "train" else [])


def check_deepspeed(recipe: Recipe, job: Job, world_size: int) -> Problems:
    """The DeepSpeed configuration, and whether the ranks can share the batch."""
    return read_ds_config(recipe)[1] + (batch_problems(recipe, world_size) if job == "train" else [])


CHECKS: dict[str, Callable[[Recipe, Job, int], Problems]] = {
    "model": check_model,
    "data": check_data,
    "mask": check_mask,
    "method": check_method,
    "tasks": check_tasks,
    "DeepSpeed and batch": check_deepspeed,
}
