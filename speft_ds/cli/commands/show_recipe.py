"""`speft show`: a recipe with every default filled in, and where each value comes from."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml

from speft_ds.cli.options import Overrides, RecipeName
from speft_ds.config.load_recipe import load_recipe, resolved_yaml
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe

COMMENT_COLUMN = 60  # comments start here at the latest, but for values that are longer


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


def in_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    written = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True)[1:-2]
    return written if len(written.splitlines()) <= 1 else json.dumps(value)  # a text with line breaks


def annotated_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again, and where each value comes from."""
    lines = list(_lines(recipe, recipe.model_dump(mode="json", exclude={"name"})))
    width = max((len(text) for text, origin in lines if origin and len(text) <= COMMENT_COLUMN), default=0)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _lines(recipe: Recipe, tree: dict[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the origin of its value; a section's own has none."""
    indent = "  " * (section.count(".") + 1 if section else 0)
    for name, value in tree.items():
        key = f"{section}.{name}" if section else name
        if key in SECTIONS:
            yield f"{indent}{name}:", ""
            yield from _lines(recipe, value, key)
        else:
            yield f"{indent}{name}: {in_line(_without_nulls(value))}", _origin(recipe, key, value)


def _without_nulls(value: Any) -> Any:
    """Of a list of mappings, the keys that are given: a mixture's sources leave most of them out."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in i.items() if v is not None} if isinstance(i, dict) else i for i in value]


def _origin(recipe: Recipe, key: str, value: Any) -> str:
    where = recipe.where(key)
    if recipe.is_given(key):
        return "command line" if where.startswith("command line:") else where.removesuffix(f" ({key})")
    set_aside = value is None and FIELDS[key].default is not None
    return "not used: another key takes its place" if set_aside else "default"
