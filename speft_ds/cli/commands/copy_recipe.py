"""`speft cp`: a recipe's file as the start of one's own."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
import yaml

from speft_ds.cli.options import RecipeName
from speft_ds.config.load_recipe import EXTENDS, RECIPES_DIR, ROOT, find_recipe, is_path, shown
from speft_ds.env import expand_path
from speft_ds.errors import UserError


def cp(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the new .yaml file, or a folder for it")],
    force: Annotated[bool, typer.Option("--force", help="overwrite a file that is there")] = False,
) -> None:
    """Copy a recipe's file, comments and all, as the start of your own."""
    new = copy_recipe(recipe, file, force)
    name, script = shlex.quote(str(new)), shlex.quote(shown(ROOT / "launch" / "train.py"))
    typer.echo(f"copied to {new}\nedit {name}   (speft schema explains the keys)")
    typer.echo(f"check it:  speft validate {name}\ntrain:     deepspeed {script} --recipe {name}")


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
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target} is not a .yaml file", "command line", f"name it {target}.yaml")
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already", "command line", "choose another name, or add --force")
    try:
        text = _moved(source.read_text(encoding="utf-8"), source.parent, target.absolute().parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot copy {shown(source)} to {target}: {error}", "command line") from None
    return target


def _moved(text: str, old: Path, new: Path) -> str:
    """A recipe's text for another folder: the relative path of a recipe that it extends is adjusted."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text  # loading it will say what is wrong
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == EXTENDS and isinstance(value, yaml.ScalarNode) and is_path(value.value):
            base = Path(os.path.abspath(old / expand_path(value.value)))
            if Path(expand_path(value.value)).is_absolute():
                return text
            is_ours = base.parent == RECIPES_DIR and base.suffix == ".yaml"
            named = base.stem if is_ours else _quoted(os.path.relpath(base, new))
            return text[: value.start_mark.index] + named + text[value.end_mark.index :]
    return text


def _quoted(path: str) -> str:
    return yaml.safe_dump(path, width=10_000).partition("\n")[0]
