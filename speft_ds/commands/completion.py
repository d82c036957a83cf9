"""What the tab key offers on the command line of `speft`. Imports no torch."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer
from rich.markup import escape

from speft_ds.cli.commands.list_recipes import first_comments
from speft_ds.cli.commands.schema_reference import EXTENDS_MEANING, choices_of, description_of
from speft_ds.cli.commands.show_recipe import in_line
from speft_ds.config.load_recipe import EXTENDS, RECIPES_DIR, list_recipes
from speft_ds.config.recipe import FIELDS, SECTIONS

Offers = list[tuple[str, str]]  # what to type, and what it is


def complete_recipe(incomplete: str) -> Offers:
    """Names of recipes, and YAML files here and one folder down."""
    names = [(name, first_comments(RECIPES_DIR / f"{name}.yaml")[0]) for name in list_recipes()]
    typed = glob.escape(incomplete)
    paths = [path for pattern in ("*.y*ml", "*/*.y*ml") for path in glob.glob(typed + pattern)]
    files = [(path, first_comments(Path(path))[0]) for path in sorted(set(paths))]
    return _offered(incomplete, [*names, *files])


def complete_override(ctx: typer.Context, incomplete: str) -> Offers:
    """Keys of a recipe and, after `=`, the choices of a key."""
    if key := _key_before(ctx):  # bash, which takes `=` for a word of its own
        return _offered(incomplete, [(choice, "") for choice in choices_of(FIELDS[key])])
    key, equals, _ = incomplete.partition("=")
    if equals:
        return _offered(incomplete, _values(key) if key in FIELDS else [])
    offers = _offered(incomplete, _keys(incomplete))
    if len(offers) == 1 and offers[0][0] in (f"{section}." for section in SECTIONS):
        offers = _offered(offers[0][0], _keys(offers[0][0]))
    if len(offers) == 1:  # two or more, so that the shell adds no space after the `=`
        key = offers[0][0].removesuffix("=")
        return [*offers, *_offered("", _values(key))] if key in FIELDS else offers
    return offers


def complete_key(incomplete: str) -> Offers:
    """Sections and keys, as `speft schema` takes them."""
    sections = [(section, description_of(section)) for section in SECTIONS]
    keys = [(key, field.description) for key, field in FIELDS.items()]
    at_top = [(EXTENDS, EXTENDS_MEANING), *((key, about) for key, about in keys if "." not in key)]
    return _offered(incomplete, sections + (keys if "." in incomplete else at_top))


def _key_before(ctx: typer.Context) -> str | None:
    """The key whose value is being typed: it is the word before this one, or the word before an `=`."""
    words = list(ctx.params.get("overrides") or ())
    key = words[-2] if words[-1:] == ["="] and len(words) > 1 else words[-1] if words else ""
    return key if key in FIELDS else None


def _keys(incomplete: str) -> Iterator[tuple[str, str]]:
    """Keys to the next dot: first sections, then what is in them."""
    for section in SECTIONS:
        if section.count(".") == incomplete.count("."):
            yield f"{section}.", description_of(section)
    for key, field in FIELDS.items():
        if key.count(".") == incomplete.count("."):
            yield f"{key}=", field.description


def _values(key: str) -> Offers:
    """A key with each of its choices or, where it has none, with its default."""
    field = FIELDS[key]
    default = None if field.is_required() else in_line(field.default)
    values = choices_of(field) or ((default,) if default else ())
    return [(f"{key}={value}", "the default" if value == default else "") for value in values]


def _offered(incomplete: str, offers: Iterable[tuple[str, str]]) -> Offers:
    """Those that begin as typed; typer takes a description for markup, so brackets are escaped."""
    return [(typed, escape(about)) for typed, about in offers if typed.startswith(incomplete)]
