"""`speft ls`, `speft show` and `speft cp`: the recipes, one with every value, and a copy to start from."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from speft_ds.cli.options import Overrides, RecipeName
from speft_ds.config import limited_yaml
from speft_ds.config.load_recipe import (
    EXTENDS,
    RECIPES_DIR,
    find_recipe,
    is_path,
    list_recipes,
    load_recipe,
    resolved_yaml,
    shown,
)
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.env import expand_path, log_rank0
from speft_ds.errors import RecipeError, UserError
from speft_ds.io import write_text
from speft_ds.terminal import Console

COMMENT_COLUMN = 60  # comments of `speft show` start here at the latest, but for values that are longer


def ls() -> None:
    """List the recipes: what each is, its model, data and density, and what it needs."""
    table = Table("recipe", "what it is", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
    for name in list_recipes():
        table.add_row(name, about(name))
    Console().print(table)


def about(name: str) -> Text:
    """What a recipe is, what it trains on what, and what it needs, or why it does not load: a line each."""
    start = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    comments = [line.removeprefix("#").strip() if line.startswith("#") else "" for line in start]
    purpose, needs = [*comments, ""][:2]
    needs = re.split(r"[.;](?:\s|$)", needs, maxsplit=1)[0].removeprefix("Needs ")  # to the first full stop
    try:
        recipe = load_recipe(name)
    except RecipeError as error:
        facts = Text(f"does not load: {'; '.join(problem.what for problem in error.problems)}", "red")
    else:
        # Data sets by the last two parts of their paths: owner/name of one on the hub.
        data = ", ".join("/".join(Path(source.path).parts[-2:]) for source in recipe.data.sources) or "none"
        count, density = recipe.mask.num_trainable, recipe.mask.density
        size = f"{count:,} weights" if density is None else f"density {density:.3%}"
        facts = Text(f"{Path(recipe.model.name_or_path).name} on {data}; {size}")
    lines = [Text(purpose), facts, Text(needs and f"needs {needs}")]
    return Text("\n").join(line for line in lines if line)


def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    plain: Annotated[bool, typer.Option("--plain", help="without the comments")] = False,
) -> None:
    """Print a recipe with every default filled in, and where each value comes from.

    The output is YAML that loads again.
    """
    loaded = load_recipe(recipe, overrides or [])
    typer.echo(resolved_yaml(loaded) if plain else annotated_yaml(loaded), nl=False)


def annotated_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again, and where each value comes from."""
    lines = list(_lines(recipe, recipe.model_dump(mode="json", exclude={"name"})))
    width = max((len(text) for text, origin in lines if origin and len(text) <= COMMENT_COLUMN), default=0)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _lines(recipe: Recipe, tree: dict[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the origin of its value; a section's own has none."""
    indent = "  " * (section.count(".") + 1 if section else 0)
    for name, value in tree.items():
        key = f"{section}.{name}".lstrip(".")
        if key in SECTIONS:
            yield f"{indent}{name}:", ""
            yield from _lines(recipe, value, key)
            continue
        yield f"{indent}{name}: {in_line(value)}", _origin(recipe, key, value)


def _origin(recipe: Recipe, key: str, value: Any) -> str:
    where = recipe.where(key)
    if recipe.is_given(key):
        return "command line" if where.startswith("command line:") else where.removesuffix(f" ({key})")
    set_aside = value is None and FIELDS[key].default is not None
    return "not used: another key takes its place" if set_aside else "default"


def in_line(value: Any) -> str:
    """A plain value as YAML on one line, without control characters."""
    written = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True)[1:-2]
    if written.isprintable():
        return written
    return re.sub(r"[^ -~]", _escaped, json.dumps(value, ensure_ascii=False))


def _escaped(found: re.Match) -> str:
    letter, number = found[0], ord(found[0])
    return letter if letter.isprintable() else f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"


def cp(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the new .yaml file, or a folder for it")],
    force: Annotated[bool, typer.Option("--force", help="overwrite a file that is there")] = False,
) -> None:
    """Copy a recipe's file, comments and all, as the start of your own."""
    source = find_recipe(recipe)
    new = file / source.name if file.is_dir() else file
    check_new(new, force)
    try:
        text = source.read_text(encoding="utf-8")
        kept = _without_own_tasks(text) if source.parent == RECIPES_DIR else text
        write_text(new, _moved(kept, source.parent, new.absolute().parent))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot copy {shown(source)} to {new}: {error}", "command line") from None
    if kept != text:
        typer.echo(f"without its section eval, whose tasks score the data of {source.stem} alone")
    typer.echo(f"copied to {new}")
    print_next_steps(new)


def check_new(file: Path, force: bool) -> None:
    """Whether a recipe may be written to a file. Raises UserError."""
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file} is not a .yaml file", "command line", f"name it {file}.yaml")
    if file.exists() and not force:
        raise UserError(f"{file} is there already", "command line", "choose another name, or add --force")


def print_next_steps(file: Path) -> None:
    """What to type next, from where the user stands."""
    name = shlex.quote(str(file))
    log_rank0(f"edit {name}   (speft schema explains the keys)")
    log_rank0(f"check it:  speft validate {name}\ntrain:     speft train {name}")


def _without_own_tasks(text: str) -> str:
    """A recipe's text without its section eval where that has tasks of its own, which score its data."""
    pairs = yaml.compose(text, Loader=yaml.SafeLoader).value
    starts = [key.start_mark.index for key, _ in pairs] + [len(text)]
    for (key, section), start, end in zip(pairs, starts, starts[1:], strict=False):
        own = [name.value for name, _ in section.value] if isinstance(section, yaml.MappingNode) else ()
        if key.value == "eval" and "include_path" in own:
            return text[:start] + text[end:]
    return text


def _moved(text: str, old: Path, new: Path) -> str:
    """A recipe's text for another folder: the relative path of a recipe that it extends is adjusted."""
    try:
        root, _ = limited_yaml.load_with_nodes(text)
    except (yaml.YAMLError, ValueError):
        return text  # loading it will say what is wrong
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    extended = next((value for key, value in pairs if key.value == EXTENDS), None)
    if not isinstance(extended, yaml.ScalarNode) or not is_path(extended.value):
        return text
    if os.path.isabs(expand_path(extended.value)):
        return text
    base = Path(os.path.abspath(old / extended.value))
    is_ours = base.parent == RECIPES_DIR and base.suffix == ".yaml"
    named = base.stem if is_ours else in_line(os.path.relpath(base, new))
    return text[: extended.start_mark.index] + named + text[extended.end_mark.index :]
