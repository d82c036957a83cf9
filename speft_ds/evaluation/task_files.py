"""The YAML files of `eval.include_path`, checked before lm-eval reads them.

lm-eval opens whatever `include` names, runs what `!function` names, and passes over what it cannot read.
Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from speft_ds.config import limited_yaml
from speft_ds.errors import UserError
from speft_ds.untrusted import path_within

IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval ignores
FUNCTION = "!function"
TAGS = (FUNCTION, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")))
# module.name: lm-eval makes a path of it, and anything else may lead to another folder.
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FIX = "correct it, or move it out of eval.include_path"


class _TaskLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML in which the name of a function is no more than a text."""


def _function_name(loader: yaml.Loader, node: yaml.Node) -> str:
    name = loader.construct_scalar(node)
    if not _FUNCTION.fullmatch(name):
        what = f"{name!r:.100} is not the name of a function"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return name


_TaskLoader.add_constructor(FUNCTION, _function_name)


def task_file_problems(folder: Path) -> list[UserError]:
    """What is wrong with the task files of a folder: not readable, too large, or with names elsewhere."""
    problems, checked = [], set()
    waiting = [path for path in sorted(folder.rglob("*.yaml")) if not IGNORED.intersection(path.parts)]
    while waiting:
        path = waiting.pop()
        if path not in checked:
            checked.add(path)
            found, included = _check(folder, path)
            problems += found
            waiting += included
    return sorted(problems, key=str)


def _check(root: Path, path: Path) -> tuple[list[UserError], list[Path]]:
    """What is wrong with a file below `root`, and the files that it includes."""
    try:
        values = _read(path)
        for name in _names(values):
            path_within(root, name)
        if foreign := [name for name in _metrics(values) if "/" in name or "\\" in name]:
            raise ValueError(f"the metric {foreign[0]!r:.100} is code from elsewhere, which is not run here")
        return [], [_included(root, path, name) for name in _as_list(values.get("include"))]
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = f"not a task's file: {getattr(error, 'problem', None) or error}"
        return [UserError(what, where, FIX)], []


def _read(path: Path) -> dict[str, Any]:
    """The keys of a file. Raises what PyYAML's constructors raise, besides OSError and ValueError."""
    text = limited_yaml.read_text(path)
    limited_yaml.check_limits(text, TAGS, _TaskLoader)
    values = yaml.load(text, _TaskLoader)
    if not isinstance(values, dict):
        raise ValueError("it has no keys")
    return values


def _names(values: dict[str, Any]) -> Iterator[object]:
    """Of the tasks and groups that a file defines; results are written to files of these names."""
    for key in ("task", "group"):
        for name in _as_list(values.get(key)):
            if isinstance(name, dict):
                yield from _names(name)
            else:
                yield name


def _metrics(value: object) -> Iterator[str]:
    """The names of metrics at any depth; those that lm-eval lacks it has `evaluate` load, and run."""
    if isinstance(value, dict) and isinstance(value.get("metric"), str):
        yield value["metric"]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _metrics(part)


def _included(root: Path, path: Path, name: object) -> Path:
    """The file that `include` names: a relative path, which may go up as far as `root`."""
    if not isinstance(name, str) or os.path.isabs(name):
        raise ValueError(f"it includes {name!r:.100}, which is not in eval.include_path")
    inside = os.path.relpath(os.path.normpath(path.parent / name), root)
    return path_within(root, inside, subfolders=True)


def _as_list(value: object) -> list:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if item is not None]
