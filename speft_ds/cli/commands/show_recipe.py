"""A recipe with where each of its values comes from, as `speft show` prints it. Imports no torch."""

from collections.abc import Iterator
from typing import Any

import yaml

from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe

COMMENT_COLUMN = 60  # comments start here at the latest, but for values that are longer


class _OneLine(yaml.SafeDumper):
    """YAML that stays on one line: text with line breaks is quoted, with \\n for them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _one_line_text(dumper: _OneLine, text: str) -> yaml.Node:
    has_breaks = text.splitlines() not in ([], [text])
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_breaks else None)


_OneLine.add_representer(str, _one_line_text)


def in_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    written = yaml.dump([value], Dumper=_OneLine, default_flow_style=True, width=10**9, allow_unicode=True)
    return written.strip()[1:-1]


def annotated_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that loads again, and where each value comes from."""
    lines = list(_lines(recipe, recipe.model_dump(mode="json", exclude={"name"})))
    widths = [len(text) for text, origin in lines if origin and len(text) <= COMMENT_COLUMN]
    width = max(widths, default=0)
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
    if where.startswith("command line:"):
        return "command line"
    if where != f"{key} (default)":
        return where.removesuffix(f" ({key})")
    set_aside = value is None and FIELDS[key].default is not None
    return "not used: another key takes its place" if set_aside else "default"
