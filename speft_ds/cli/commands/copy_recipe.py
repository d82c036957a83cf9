"""`speft cp`: a recipe's file as the start of one's own. Imports no torch."""

import os
import shlex
from pathlib import Path

import yaml

from speft_ds.config.load_recipe import EXTENDS, RECIPES_DIR, ROOT, find_recipe, shown
from speft_ds.env import expand_path
from speft_ds.errors import UserError

SUFFIXES = (".yaml", ".yml")


def copy_recipe(name_or_path: str, target: Path, overwrite: bool = False) -> Path:
    """Copy a recipe's file, comments and all; returns the new file.

    Args:
        target: the new file, or a folder that it goes to under its old name.
    Raises:
        UserError: there is no such recipe, `target` is no .yaml file, or is there already.
    """
    source = find_recipe(name_or_path)
    if target.is_dir():
        target /= source.name
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} is not a .yaml file", "command line", f"name it {target}.yaml")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already", "command line", "choose another name, or add --force")
    try:
        text = moved(source.read_text(encoding="utf-8"), source.parent, target.absolute().parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot copy {shown(source)} to {target}: {error}", "command line") from None
    return target


def moved(text: str, old: Path, new: Path) -> str:
    """A recipe's text for another folder: the relative path of a recipe that it extends is adjusted."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text  # loading it will say what is wrong
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == EXTENDS and isinstance(value, yaml.ScalarNode):
            named = _named_from(value.value, old, new)
            return text[: value.start_mark.index] + named + text[value.end_mark.index :]
    return text


def _named_from(base: str, old: Path, new: Path) -> str:
    """What a file in `new` must write to extend the recipe that one in `old` calls `base`."""
    path = Path(expand_path(base))
    is_name = path.suffix not in SUFFIXES and "/" not in base
    if is_name or path.is_absolute():
        return base
    path = Path(os.path.abspath(old / path))
    if path.parent == RECIPES_DIR and path.suffix == ".yaml":
        return path.stem
    return yaml.safe_dump(os.path.relpath(path, new), width=10_000).partition("\n")[0]


def next_steps(file: Path) -> str:
    """What to type with a new recipe."""
    name = shlex.quote(str(file))
    script = shlex.quote(shown(ROOT / "launch" / "train.py"))
    return (
        f"edit {name}   (speft schema explains the keys)\n"
        f"check it:  speft validate {name}\n"
        f"train:     deepspeed {script} --recipe {name}"
    )
