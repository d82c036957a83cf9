"""`speft schema`: the keys of a recipe with type, default and meaning, from pydantic's JSON schema."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from speft_ds.cli.commands.show_recipe import in_line
from speft_ds.config.load_recipe import EXTENDS, guess_key
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.config.section import rules_of
from speft_ds.errors import UserError

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
REQUIRED = "required"
TYPES = {"integer": "integer", "number": "number", "string": "text", "null": "null"}


def schema(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="a section or a key to explain; without it, all")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="the JSON schema of recipes, which editors can check by")
    ] = False,
) -> None:
    """Explain the keys of a recipe: type or choices, default, meaning, and the rules between keys.

    A pipe gets one line per key, to search with grep.
    """
    if as_json and key:
        raise typer.BadParameter("--json prints the complete schema: leave KEY out")
    if as_json:
        typer.echo(json.dumps(json_schema(), indent=2))
    else:
        print_reference(Console(), key)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe's file. Nothing is required: a recipe that it extends may have it."""
    schema = Recipe.model_json_schema()
    del schema["properties"]["name"]  # set by the file's name
    about = "a recipe to start from: its name, or a path that starts at this file's folder"
    extends = {"type": "string", "minLength": 1, "description": about}
    schema["properties"] = {EXTENDS: extends, **schema["properties"]}
    for node in (schema, *(schema["$defs"][section.__name__] for section in SECTIONS.values())):
        node.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def keys() -> dict[str, dict[str, Any]]:
    """Every key and its JSON schema; those of a mixture's sources are like data.mixture[].path."""
    schema = json_schema()
    return dict(_below(schema, "", schema["$defs"]))


def _below(node: dict[str, Any], prefix: str, defs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, found in node["properties"].items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            yield from _below(defs[SECTIONS[key].__name__], f"{key}.", defs)
            continue
        parent = key.partition("[]")[0]
        about = {"description": f"as {parent.rpartition('.')[0]}.{name}"} if parent != key else {}
        is_required = name in node.get("required", ()) or (key in FIELDS and FIELDS[key].is_required())
        yield key, {**about, **found, "required": is_required}
        items = next((option["items"] for option in options(found) if "items" in option), {})
        if "$ref" in items:
            yield from _below(defs[items["$ref"].rpartition("/")[2]], f"{key}[].", defs)


def options(node: dict[str, Any]) -> list[dict[str, Any]]:
    """What a key may be, where that is one of several."""
    return node.get("anyOf", [node])


def kind_of(node: dict[str, Any]) -> str:
    """The type in words, with what a value must hold to, or the choices."""
    kinds = [_kind(option) for option in options(node)]
    return " or ".join(kind for kind in kinds if kind != "null") + (", or null" if "null" in kinds else "")


def _kind(node: dict[str, Any]) -> str:
    if "$ref" in node:
        return f"{node['$ref'].rpartition('/')[2].lower()} section"
    if "enum" in node or node["type"] == "boolean":
        return " | ".join(node.get("enum", ("true", "false")))
    if node["type"] == "array":
        least, most = node.get("minItems", 0), node.get("maxItems")
        number = f"{least}: " if least == most else f"{least} or more: " if least else ""
        return f"list of {number}{kind_of(node['items'])}"
    bounds = " and ".join(f"{sign} {node[name]:g}" for name, sign in BOUNDS.items() if name in node)
    return f"{node.get('format') or TYPES[node['type']]} {bounds}".rstrip()


def rules(key: str) -> list[str]:
    """The rules between this key and others of its section."""
    section, _, name = key.rpartition(".")
    return [
        rule.describe(section, other)
        for other, field in (SECTIONS[section].model_fields if section in SECTIONS else {}).items()
        for rule in rules_of(field)
        if name in (other, rule.other)
    ]


def print_reference(console: Console, wanted: str | None = None) -> None:
    """Print all keys, those of a section, or one with its rules. To a pipe as one line per key.

    Raises:
        UserError: there is no such key.
    """
    wanted, everything = (wanted or "").rstrip("."), keys()
    below = (f"{wanted}.", f"{wanted}[") if wanted else ""
    shown = [key for key in everything if key == wanted or key.startswith(below)]
    if not shown:
        raise UserError(f"unknown key {wanted}", "command line", guess_key(wanted))
    rows = {key: _row(everything[key]) for key in shown}
    for section in dict.fromkeys(map(_parent, shown)) if console.is_terminal else ():
        table = Table("key", "type", "default", "meaning", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
        for key in (key for key in shown if _parent(key) == section):
            table.add_row(key.removeprefix(f"{section}."), *map(Text, rows[key]))
        console.print(Text(_title(section), "bold"), table, "", sep="\n")
    for key, (kind, default, meaning) in rows.items() if not console.is_terminal else ():
        default = default if default == REQUIRED else f"default {default}"
        console.print(Text(f"{key} ({kind}; {default}): {meaning}"), soft_wrap=True)
    for rule in rules(wanted):
        console.print(Text(f"  {rule}"), soft_wrap=not console.is_terminal)


def _row(node: dict[str, Any]) -> tuple[str, str, str]:
    """Type, default and meaning of a key."""
    default = REQUIRED if node["required"] else in_line(node.get("default"))
    return kind_of(node), default, node["description"]


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _title(section: str) -> str:
    parent, _, name = section.rpartition(".")
    if section not in SECTIONS:
        return section or "top level"
    return f"{section}: {(SECTIONS[parent] if parent else Recipe).model_fields[name].description}"
