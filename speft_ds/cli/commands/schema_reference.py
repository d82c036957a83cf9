"""`speft schema`: the keys of a recipe with type, default and meaning, from pydantic's JSON schema."""

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from speft_ds.cli.commands.recipes import in_line
from speft_ds.config.load_recipe import EXTENDS, guess_key
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.config.section import rules_of
from speft_ds.errors import UserError
from speft_ds.terminal import Console

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "integer", "number": "number", "string": "text", "object": "keys and values"}


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
    definitions, found = schema["$defs"], {EXTENDS: schema["properties"][EXTENDS]}
    for key, field in FIELDS.items():
        section, _, name = key.rpartition(".")
        node = definitions[SECTIONS[section].__name__] if section else schema
        found[key] = {**node["properties"][name], "required": field.is_required()}
        if key == "data.mixture":
            for name, own in definitions["Source"]["properties"].items():
                required = name in definitions["Source"]["required"]
                found[f"{key}[].{name}"] = {"description": f"as data.{name}", **own, "required": required}
    return found


def kind_of(node: dict[str, Any]) -> str:
    """The type in words, with what a value must hold to, or the choices."""
    options = node.get("anyOf", [node])
    kinds = [_kind(option) for option in options if option.get("type") != "null"]
    return " or ".join(kinds) + (", or null" if len(kinds) < len(options) else "")


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
    fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    return [
        rule.describe(section, other)
        for other, field in fields.items()
        for rule in rules_of(field)
        if name in (other, rule.other)
    ]


def print_reference(console: Console, wanted: str | None = None) -> None:
    """Print all keys, a section, or one key with its rules; to a pipe one line each. Raises UserError."""
    wanted = (wanted or "").rstrip(".")
    below = (f"{wanted}.", f"{wanted}[") if wanted else ""
    shown = {key: node for key, node in keys().items() if key == wanted or key.startswith(below)}
    if not shown:
        raise UserError(f"unknown key {wanted}", "command line", guess_key(wanted))
    tables: dict[str, Table] = {}
    for key, node in shown.items():
        section, _, name = key.rpartition(".")
        is_required, kind, meaning = node.get("required"), kind_of(node), node["description"]
        default = "required" if is_required else in_line(node.get("default"))
        if console.is_terminal:
            tables.setdefault(section, _empty_table()).add_row(name, Text(kind), Text(default), Text(meaning))
        else:
            default = default if is_required else f"default {default}"
            console.print(Text(f"{key} ({kind}; {default}): {meaning}"), soft_wrap=True)
    for section, table in tables.items():
        console.print(Text(_title(section), "bold"), table, "", sep="\n")
    for rule in rules(wanted):
        console.print(Text(f"  {rule}"), soft_wrap=not console.is_terminal)


def _empty_table() -> Table:
    table = Table("key", "type", "default", "meaning", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
    return table


def _title(section: str) -> str:
    parent, _, name = section.rpartition(".")
    if section not in SECTIONS:
        return section or "top level"
    return f"{section}: {(SECTIONS[parent] if parent else Recipe).model_fields[name].description}"
