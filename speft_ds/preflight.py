"""What can be known of a recipe's files before torch is imported: a typo should not cost eight GPUs."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

from speft_ds.ds_config import batch_problems, read_ds_config
from speft_ds.errors import RecipeError, UserError, closest
from speft_ds.recipe import CACHE, Recipe, expand_path
from speft_ds.rows import iterate_objects


def check_inputs(recipe: Recipe, world_size: int) -> None:
    """Check all that needs files but no torch: model, data, batch, tasks, DeepSpeed. Raises RecipeError."""
    problems = _model_problems(recipe) + _data_problems(recipe) + batch_problems(recipe, world_size)
    folder = recipe.eval.include_path
    if folder is not None and not os.path.isdir(folder):
        fix = _way_to(folder, "eval.include_path")
        problems.append(UserError(f"no task folder {folder}", recipe.where("eval.include_path"), fix))
    problems += read_ds_config(recipe)[1]
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")


def check_output_dir(recipe: Recipe) -> None:
    """Refuse a run folder that is not empty. Raises UserError."""
    folder = Path(recipe.output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        fix = f"choose another, output_dir={folder}-2, or remove this one: rm -r {folder}"
        raise UserError(f"the run folder {folder} is not empty", recipe.where("output_dir"), fix)


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


def _data_problems(recipe: Recipe) -> list[UserError]:
    path, where = Path(recipe.data.path), recipe.where("data.path")
    if path.suffix not in (".json", ".jsonl"):
        what = f"the data file {path} is neither .json nor .jsonl"
        return [UserError(what, where, "convert it, or rename it")]
    if not path.is_file():
        return [UserError(f"no data file {path}", where, _way_to(str(path), "data.path"))]
    try:
        rows = list(islice(iterate_objects(path), 5))
    except UserError as error:
        return [error]
    if not rows:
        fix = _way_to(str(path), "data.path")
        return [UserError(f"the data file {path} has no rows", where, fix)]
    return _column_problems(recipe, rows)


def _column_problems(recipe: Recipe, rows: list[tuple[str, Any]]) -> list[UserError]:
    for where, row in rows:
        if not isinstance(row, dict):
            return [UserError("a row is not a JSON object", where, "each row is like {column: text, ...}")]
        columns = ("prompt_column", "response_column")
        missing = [key for key in columns if getattr(recipe.data, key) not in row]
        if missing:  # the first bad row says it; the next ones would repeat it
            return [_no_column(recipe, f"data.{key}", where, list(row)) for key in missing]
    return []


def _no_column(recipe: Recipe, key: str, where: str, columns: list[str]) -> UserError:
    name = getattr(recipe.data, key.split(".")[-1])
    guess = closest(name, columns)
    fix = f"did you mean {key}={guess[0]}?" if guess else f"type {key}=COLUMN, one of: {', '.join(columns)}"
    return UserError(f"the row has no column {name!r}, named by {recipe.where(key)}", where, fix)
