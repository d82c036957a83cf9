"""What can be known of a recipe's files before torch is imported: a typo should not cost eight GPUs."""

import os
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from speft_ds.ds_config import batch_problems, read_ds_config
from speft_ds.errors import RecipeError, UserError, closest
from speft_ds.rows import iterate_objects
from speft_ds.schema import CACHE, FIELDS, MASK_FILE, NEEDS_DATA, Recipe, expand_path


def check_inputs(recipe: Recipe, world_size: int, needs_training_rows: bool = True) -> None:
    """Check all that needs files but no torch: model, rows, mask, batch, tasks, DeepSpeed.

    Args:
        needs_training_rows: False where nothing is trained or evaluated: then batch and tasks do not matter,
            and rows only as far as the mask is scored on them.
    Raises:
        RecipeError: all the problems.
    """
    problems = _model_problems(recipe) + _rows_problems(recipe, needs_training_rows) + _mask_problems(recipe)
    if needs_training_rows:
        problems += batch_problems(recipe, world_size) + _task_problems(recipe)
    problems += read_ds_config(recipe)[1]
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")


def check_output_dir(recipe: Recipe) -> None:
    """Refuse a run folder that is not empty. Raises UserError."""
    folder = Path(recipe.output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        fix = f"choose another, output_dir={folder}-2, or remove this one: rm -r {folder}"
        raise UserError(f"the run folder {folder} is not empty", recipe.where("output_dir"), fix)


def mask_file(path: str | Path, where: str | None = None) -> Path:
    """The file of a saved mask: `path` itself or, if that is a folder, the mask.safetensors in it.

    Raises:
        UserError: there is no such file, or it is no .safetensors file; `where` says who named it.
    """
    file = Path(path) / MASK_FILE if os.path.isdir(path) else Path(path)
    fix = f"name a {MASK_FILE} or its folder; `speft score RECIPE` writes one"
    if file.suffix != ".safetensors":
        raise UserError(f"the mask file {file} is not a .safetensors file", where, fix)
    if not file.is_file():
        raise UserError(f"no mask file {file}", where, fix)
    return file


def _way_to(path: str, key: str) -> str:
    if Path(path).is_relative_to(expand_path(CACHE)):
        return "run `speft quickstart --prepare-only`, which makes it"
    return f"type {key}=/the/right/path"


def _model_problems(recipe: Recipe) -> list[UserError]:
    name, where = recipe.model.name_or_path, recipe.where("model.name_or_path")
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "config.json")):
            return []
        fix = _way_to(name, "model.name_or_path")
        return [UserError(f"the model folder {name} has no config.json", where, fix)]
    if name[0] in "/.~" or name.count("/") != 1:
        fix = _way_to(name, "model.name_or_path") + ("" if name[0] in "/.~" else "; a hub id is owner/name")
        return [UserError(f"no model folder {name}", where, fix)]
    return []  # a hub id; whether it exists is for the hub to say


def _task_problems(recipe: Recipe) -> list[UserError]:
    folder, key = recipe.eval.include_path, "eval.include_path"
    if folder is None or os.path.isdir(folder):
        return []
    return [UserError(f"no task folder {folder}", recipe.where(key), _way_to(folder, key))]


def _mask_problems(recipe: Recipe) -> list[UserError]:
    try:
        if recipe.mask.load is not None:
            mask_file(recipe.mask.load, recipe.where("mask.load"))
    except UserError as error:
        return [error]
    return []


def _rows_problems(recipe: Recipe, needs_training_rows: bool) -> list[UserError]:
    """What is wrong with the rows that will be read: to train on, to calibrate on."""
    training, calibration = recipe.data.path, recipe.mask.calibration_path
    calibrates = recipe.mask.needs_calibration
    problems = []
    if needs_training_rows and training is None:
        fix = f"type data.path=/the/right/path  ({FIELDS['data.path'].description})"
        problems.append(UserError("data.path is missing", recipe.where("data.path"), fix))
    elif calibrates and training is None and calibration is None:
        problems.append(_no_calibration_rows(recipe))
    if training is not None and (needs_training_rows or (calibrates and calibration is None)):
        problems += _file_problems(recipe, "data.path", training)
    if calibrates and calibration is not None:
        problems += _file_problems(recipe, "mask.calibration_path", calibration)
    return problems


def _no_calibration_rows(recipe: Recipe) -> UserError:
    data_free = [name for name in get_args(FIELDS["mask.salience"].annotation) if name not in NEEDS_DATA]
    what = f"mask.salience={recipe.mask.salience} needs calibration data, and the recipe names none"
    fix = f"set data.path or mask.calibration_path, or a metric without data: {', '.join(data_free)}"
    return UserError(what, recipe.where("mask.salience"), fix)


def _file_problems(recipe: Recipe, key: str, name: str) -> list[UserError]:
    """What is wrong with a file of rows, going by its first ones; `key` of the recipe names it."""
    path, where = Path(name), recipe.where(key)
    if path.suffix not in (".json", ".jsonl"):
        what = f"the data file {path} is neither .json nor .jsonl"
        return [UserError(what, where, "convert it, or rename it")]
    if not path.is_file():
        return [UserError(f"no data file {path}", where, _way_to(name, key))]
    try:
        rows = list(islice(iterate_objects(path), 5))
    except UserError as error:
        return [error]
    if not rows:
        return [UserError(f"the data file {path} has no rows", where, _way_to(name, key))]
    return _column_problems(recipe, key, rows)


def _column_problems(recipe: Recipe, file_key: str, rows: list[tuple[str, Any]]) -> list[UserError]:
    for where, row in rows:
        if not isinstance(row, dict):
            return [UserError("a row is not a JSON object", where, "each row is like {column: text, ...}")]
        columns = ("prompt_column", "response_column")
        missing = [key for key in columns if getattr(recipe.data, key) not in row]
        if missing:  # the first bad row says it; the next ones would repeat it
            return [_no_column(recipe, file_key, f"data.{key}", where, list(row)) for key in missing]
    return []


def _no_column(recipe: Recipe, file_key: str, key: str, where: str, columns: list[str]) -> UserError:
    name = getattr(recipe.data, key.split(".")[-1])
    guess = closest(name, columns)
    fix = f"did you mean {key}={guess[0]}?" if guess else f"type {key}=COLUMN, one of: {', '.join(columns)}"
    if file_key == "mask.calibration_path" and recipe.data.path is not None:
        fix = f"{key} holds for data.path too: rename this file's column, one of: {', '.join(columns)}"
    return UserError(f"the row has no column {name!r}, named by {recipe.where(key)}", where, fix)
