"""Arguments that several commands take, and the examples in their help."""

from typing import Annotated

import typer

from speft_ds.config.load_recipe import list_recipes


def _recipe_names(incomplete: str) -> list[str]:
    return [name for name in list_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="a name that `speft ls` lists, or the path of a YAML file",
        autocompletion=_recipe_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="keys of the recipe to change, like mask.density=0.01; `speft schema` lists them",
    ),
]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="number of ranks; default: one per GPU, or 2 on the CPU")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="show what DeepSpeed's launcher says of its own work, too")
]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n  ".join(["Examples:", *commands])
