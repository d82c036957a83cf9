"""What can be known of a recipe's files before torch is imported: a typo should not cost eight GPUs."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from speft_ds import hub
from speft_ds.config.data_config import Source
from speft_ds.config.deepspeed_config import batch_problems, read_ds_config
from speft_ds.config.mask_config import MASK_FILE, NEEDS_DATA
from speft_ds.config.recipe import FIELDS, Recipe
from speft_ds.data.formats import check_columns
from speft_ds.data.readers import SUFFIXES, folder_files, is_hub_dataset, iterate_file, kind_of
from speft_ds.env import CACHE, expand_path
from speft_ds.errors import RecipeError, UserError
from speft_ds.training.monitor import monitor_problems


def check_inputs(recipe: Recipe, world_size: int, needs_training_rows: bool = True) -> None:
    """Check all that needs files but no torch: model, rows, mask, batch, tasks, DeepSpeed.

    Args:
        needs_training_rows: False where nothing is trained or evaluated: then batch and tasks do not matter,
            and rows only as far as the mask is scored on them.
    Raises:
        RecipeError: all the problems.
    """
    problems = model_problems(recipe) + rows_problems(recipe, needs_training_rows)
    if needs_training_rows:
        problems += other_problems(recipe) + batch_problems(recipe, world_size)
    else:
        problems += _mask_problems(recipe)
    problems += read_ds_config(recipe)[1]
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")


def check_to_evaluate(recipe: Recipe) -> None:
    """Check what a scoring of the tasks needs: model, task folder, DeepSpeed. Raises RecipeError."""
    problems = _model_problems(recipe, "model.name_or_path", recipe.model.name_or_path)
    problems += _task_problems(recipe) + read_ds_config(recipe)[1]
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")


def resolve_offline(recipe: Recipe) -> str | None:
    """Where the hub gives no answer, have its libraries use their cache alone; returns what to tell the user.

    They would retry for minutes.
    """
    data = recipe.data
    names = [recipe.model.name_or_path, data.scorer, recipe.mask.calibration_path, recipe.eval.validation]
    names += [source.path for source in data.sources]
    may_ask = any(name and is_hub_dataset(name) for name in names) or bool(
        recipe.eval.tasks or recipe.eval.forgetting_tasks
    )
    if not may_ask or hub.is_offline_by_choice() or hub.is_reachable():
        return None
    hub.go_offline()
    return f"note: {hub.why_unreachable()}: what is in the hub's cache is used as it is (HF_HUB_OFFLINE=1)"


def mask_file(path: str | Path, where: str | None = None) -> Path:
    """The file of a saved mask: `path` itself or, if that is a folder, the mask.safetensors in it.

    Raises:
        UserError: there is no such file, or it is no .safetensors file; `where` says who named it.
    """
    file = Path(path) / MASK_FILE if os.path.isdir(path) else Path(path)
    fix = f"name a {MASK_FILE} or its folder; `speft score RECIPE` writes one"
    if file.is_file() and file.suffix != ".safetensors":
        raise UserError(f"the mask file {file} is not a .safetensors file", where, fix)
    if not file.is_file():
        raise UserError(f"no mask file {file}", where, fix)
    return file


def _way_to(path: str, key: str) -> str:
    if Path(path).is_relative_to(expand_path(CACHE)):
        return "run `speft quickstart --prepare-only`, which makes it"
    return f"type {key}=/the/right/path"


def other_problems(recipe: Recipe) -> list[UserError]:
    """What is wrong with the files of the mask and of the tasks, and with where metrics go."""
    return _mask_problems(recipe) + _task_problems(recipe) + monitor_problems(recipe)


def model_problems(recipe: Recipe) -> list[UserError]:
    """What is wrong with the folder or the hub id of the model."""
    name = recipe.model.name_or_path
    return _model_problems(recipe, "model.name_or_path", name) or _length_problems(recipe)


def _length_problems(recipe: Recipe) -> list[UserError]:
    """Rows that may be longer than the model has positions for."""
    folder, length = hub.model_folder(recipe.model.name_or_path), recipe.data.max_length
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError) as error:
        where = str(folder / "config.json")
        return [UserError(f"not readable as JSON: {error}", where, "download or copy it again")]
    most = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if not isinstance(most, int) or length <= most:
        return []
    what = f"data.max_length={length} is more than the {most} positions of the model"
    return [UserError(what, recipe.where("data.max_length"), f"data.max_length={most}, or less")]


def _model_problems(recipe: Recipe, key: str, name: str) -> list[UserError]:
    where = recipe.where(key)
    if os.path.isdir(name):
        fix = _way_to(name, key)
        if not os.path.isfile(os.path.join(name, "config.json")):
            return [UserError(f"the model folder {name} has no config.json", where, fix)]
        if missing := hub.missing_weights(Path(name)):
            what = f"the model folder {name} lacks {', '.join(missing[:3])}"
            what += f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
            return [UserError(what, where, f"download or copy it again; {fix}")]
        return []
    if name[0] in "/.~" or name.count("/") != 1:
        fix = _way_to(name, key) + ("" if name[0] in "/.~" else "; a hub id is owner/name")
        return [UserError(f"no model folder {name}", where, fix)]
    folder = hub.model_folder(name)
    if (folder and not hub.missing_weights(folder)) or hub.is_reachable():
        return []  # whether it exists, is for the hub to say
    what = f"the model {name} is not in the hub's cache, and cannot be fetched: {hub.why_unreachable()}"
    return [UserError(what, where, hub.model_hint(name, key))]


def _task_problems(recipe: Recipe) -> list[UserError]:
    section, problems = recipe.eval, []
    named = [
        ("eval.include_path", section.include_path, "task folder", os.path.isdir),
        ("eval.data_dir", section.data_dir, "data folder", os.path.isdir),
        ("eval.forgetting_text", section.forgetting_text, "text file", os.path.isfile),
    ]
    for key, path, what, is_there in named:
        if path is not None and not is_there(path):
            problems.append(UserError(f"no {what} {path}", recipe.where(key), _way_to(path, key)))
    return problems


def _mask_problems(recipe: Recipe) -> list[UserError]:
    try:
        if recipe.mask.load is not None:
            mask_file(recipe.mask.load, recipe.where("mask.load"))
    except UserError as error:
        return [error]
    return []


def rows_problems(recipe: Recipe, needs_training_rows: bool) -> list[UserError]:
    """What is wrong with the rows that will be read: to train on, to calibrate on."""
    sources, calibration = recipe.data.sources, recipe.mask.calibration_path
    calibrates = recipe.mask.needs_calibration
    problems = []
    if needs_training_rows and not sources:
        fix = f"type data.path=/the/right/path  ({FIELDS['data.path'].description})"
        problems.append(UserError("data.path is missing", recipe.where("data.path"), fix))
    elif calibrates and not sources and calibration is None:
        problems.append(_no_calibration_rows(recipe))
    if needs_training_rows or (calibrates and calibration is None):
        if recipe.data.scorer is not None:
            problems += _model_problems(recipe, "data.scorer", recipe.data.scorer)
        for number, source in enumerate(sources):
            problems += _source_problems(recipe, "data.path", source, recipe.where_rows(number))
    if calibrates and calibration is not None:
        source = recipe.data.model_copy(update={"path": calibration, "mixture": None}).sources[0]
        where = recipe.where("mask.calibration_path")
        problems += _source_problems(recipe, "mask.calibration_path", source, where)
    if needs_training_rows and sources and (validation := recipe.eval.validation) is not None:
        source = recipe.data.model_copy(update={"path": validation, "mixture": None}).sources[0]
        problems += _source_problems(recipe, "eval.validation", source, recipe.where("eval.validation"))
    return problems


def _no_calibration_rows(recipe: Recipe) -> UserError:
    data_free = [name for name in get_args(FIELDS["mask.salience"].annotation) if name not in NEEDS_DATA]
    what = f"mask.salience={recipe.mask.salience} needs calibration data, and the recipe names none"
    fix = f"set data.path or mask.calibration_path, or a metric without data: {', '.join(data_free)}"
    return UserError(what, recipe.where("mask.salience"), fix)


def _source_problems(recipe: Recipe, key: str, source: Source, where: str) -> list[UserError]:
    """What is wrong with a source of rows, going by the first ones; `key` of the recipe names it."""
    path, fix = Path(source.path), _way_to(source.path, key)
    if is_hub_dataset(source.path):
        if hub.has_dataset(source.path) or hub.is_reachable():
            return []
        what = f"the data set {source.path} is not in the hub's cache, and cannot be fetched: {hub.why_unreachable()}"
        return [UserError(what, where, hub.dataset_hint(source.path))]
    if path.is_dir():
        if not any(kind_of(file) for file in path.rglob("*")):
            return [UserError(f"the folder {path} has no file of rows ({', '.join(SUFFIXES)})", where, fix)]
        try:
            path = folder_files(source)[0]
        except UserError as error:
            return [UserError(error.what, where, error.fix)]
    elif not kind_of(path):
        what = f"the data file {path} is none of {', '.join(SUFFIXES)}, nor one of them as .gz or .zst"
        return [UserError(what, where, "convert it, or rename it")]
    elif not path.is_file():
        return [UserError(f"no data file {path}", where, fix)]
    try:
        rows = list(islice(iterate_file(path), 5))
    except UserError as error:
        return [error]
    if not rows:
        return [UserError(f"the data file {path} has no rows", where, fix)]
    return _column_problems(recipe, key, source, rows)


def _column_problems(
    recipe: Recipe, file_key: str, source: Source, rows: list[tuple[str, Any]]
) -> list[UserError]:
    for where, row in rows:
        problems = check_columns(row, where, source)
        if problems and file_key != "data.path" and recipe.data.sources:
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else "a list of objects"
            fix = f"data.columns holds for the training rows too: rename this file's ({columns})"
            return [UserError(problem.what, problem.where, fix) for problem in problems]
        if problems:  # the first bad row says it; the next ones would repeat it
            return problems
    return []
