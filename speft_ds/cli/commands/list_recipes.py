"""The recipes of the repository as `speft ls` shows them. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from speft_ds.config.load_recipe import RECIPES_DIR, list_recipes, load_recipe
from speft_ds.config.recipe import Recipe
from speft_ds.errors import RecipeError, UserError

TABLE_WIDTH = 150  # columns of a terminal from which on a table is readable


@dataclass(frozen=True)
class Listed:
    """One recipe: what its comments and its values say, or why it does not load."""

    name: str
    about: str
    needs: str
    model: str = ""
    data: str = ""
    density: str = ""
    error: str | None = None


def list_all() -> Iterator[Listed]:
    """Every recipe of the repository, whether it loads or not."""
    for name in list_recipes():
        about, needs = first_comments(RECIPES_DIR / f"{name}.yaml")
        try:
            recipe = load_recipe(name)
            yield Listed(name, about, needs, _model(recipe), _data(recipe), _density(recipe))
        except UserError as error:
            yield Listed(name, about, needs, error=_in_short(error))


def first_comments(file: Path) -> tuple[str, str]:
    """What a recipe is (its first comment line), and what it needs (its second, to the first full stop)."""
    lines = [line.removeprefix("#").strip() for line in _comment_lines(file)] + ["", ""]
    needs = re.split(r"[.;](?:\s|$)", lines[1], maxsplit=1)[0]
    return lines[0], needs.removeprefix("Needs ")


def _comment_lines(file: Path) -> list[str]:
    """The first lines of a file that are comments, two at most."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, UnicodeDecodeError):
        return []
    return lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), 2)]


def _model(recipe: Recipe) -> str:
    return Path(recipe.model.name_or_path).name


def _data(recipe: Recipe) -> str:
    """Data sets by the last two parts of their paths: owner/name of one on the hub."""
    return ", ".join("/".join(Path(source.path).parts[-2:]) for source in recipe.data.sources) or "none"


def _density(recipe: Recipe) -> str:
    mask = recipe.mask
    return f"{mask.num_trainable:,} weights" if mask.density is None else f"{mask.density:.3%}"


def _in_short(error: UserError) -> str:
    problems = error.problems if isinstance(error, RecipeError) else [error]
    return "; ".join(problem.what for problem in problems)


def print_list(console: Console) -> None:
    """Print every recipe: a table where that is readable, else a paragraph each."""
    listed = list(list_all())
    if console.width >= TABLE_WIDTH:
        console.print(_table(listed))
    else:
        for recipe in listed:
            _print_paragraph(console, recipe)


def _table(listed: list[Listed]) -> Table:
    columns = ("recipe", "what it is", "model", "data", "density", "needs")
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
    for r in listed:
        if r.error:
            table.add_row(r.name, Text(f"does not load: {r.error}", "red"))
        else:
            table.add_row(r.name, *map(Text, (r.about, r.model, r.data, r.density, r.needs)))
    return table


def _print_paragraph(console: Console, recipe: Listed) -> None:
    console.print(recipe.name, style="bold cyan", highlight=False)
    facts = [f"{recipe.model} on {recipe.data}; density: {recipe.density}"]
    lines = [recipe.about, *(facts if recipe.error is None else [])]
    lines += [f"needs {recipe.needs}"] if recipe.needs else []
    for line in filter(None, lines):
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    if recipe.error:
        console.print(Padding(Text(f"does not load: {recipe.error}", "red"), (0, 0, 0, 2), expand=False))
