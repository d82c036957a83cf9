"""`speft ls`: the recipes of the repository, each with its model, its data and what it needs."""

import re
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from speft_ds.config.load_recipe import RECIPES_DIR, list_recipes, load_recipe
from speft_ds.config.recipe import Recipe
from speft_ds.errors import RecipeError, UserError


def ls() -> None:
    """List the recipes: what each is, its model, data and density, and what it needs."""
    console = Console()
    table = Table("recipe", "what it is", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
    for name in list_recipes():
        table.add_row(name, about(name))
    console.print(table)


def about(name: str) -> Text:
    """What a recipe is, what it trains on what, and what it needs, or why it does not load: a line each."""
    purpose, needs = first_comments(RECIPES_DIR / f"{name}.yaml")
    try:
        facts = Text(_facts(load_recipe(name)))
    except UserError as error:
        problems = error.problems if isinstance(error, RecipeError) else [error]
        facts = Text(f"does not load: {'; '.join(problem.what for problem in problems)}", "red")
    lines = [Text(purpose), facts, Text(needs and f"needs {needs}")]
    return Text("\n").join(line for line in lines if line)


def first_comments(file: Path) -> tuple[str, str]:
    """What a recipe is (its first comment line), and what it needs (its second, to the first full stop)."""
    lines = [*file.read_text(encoding="utf-8").splitlines()[:2], "", ""]
    first, second = (line.removeprefix("#").strip() if line.startswith("#") else "" for line in lines[:2])
    return first, re.split(r"[.;](?:\s|$)", second, maxsplit=1)[0].removeprefix("Needs ")


def _facts(recipe: Recipe) -> str:
    # Data sets by the last two parts of their paths: owner/name of one on the hub.
    data = ", ".join("/".join(Path(source.path).parts[-2:]) for source in recipe.data.sources) or "none"
    mask = recipe.mask
    density = f"{mask.num_trainable:,} weights" if mask.density is None else f"density {mask.density:.3%}"
    return f"{Path(recipe.model.name_or_path).name} on {data}; {density}"
