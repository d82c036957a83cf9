"""Arguments that several commands take, and the examples in their help."""

from pathlib import Path
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
ON_CPU = 2  # ranks of the quickstart where there is no GPU: it shows sharding, and two cores have room for it
Ranks = Annotated[
    int | None, typer.Option(min=1, help="number of ranks; default: one per GPU, or 1 on the CPU")
]
Hostfile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="the machines, a line each like: node1 slots=8; default: this one"),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="show the launcher's command, and what DeepSpeed says of its work")
]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n  ".join(["Examples:", *commands])
