"""What each key of a recipe is: its type, its default, what it means. `speft schema` prints it.

Imports no torch.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from speft_ds.config.optimizer_config import OPTIMIZER_USED_WITH

from speft_ds.cli.commands.show_recipe import in_line
from speft_ds.config.data_config import DATA_USED_WITH
from speft_ds.config.load_recipe import EXTENDS
from speft_ds.config.mask_config import MASK_GOES_WITH, MASK_USED_WITH
from speft_ds.config.recipe import FIELDS, SECTIONS, Recipe
from speft_ds.env import expand_path
from speft_ds.errors import UserError, closest

TOP = "top level"
REQUIRED = "required"
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
TYPES = {int: "integer", float: "number", str: "text"}
EXTENDS_MEANING = "a recipe to start from: its name, or a path that starts at this file's folder"


@dataclass(frozen=True)
class Entry:
    """What there is to know of one key.

    Attributes:
        key: in full, like mask.density; of a mixture's sources like data.mixture[].path.
        kind: its type with its bounds, or its choices.
        default: as YAML writes it, or `required`.
        meaning: one line.
        choices: of a key that has some.
    """

    key: str
    kind: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        return _parent(self.key) or TOP

    @property
    def name(self) -> str:
        """The key within its section."""
        return _leaf(self.key)


def entries() -> list[Entry]:
    """All keys in the schema's order; those of a mixture's sources follow data.mixture."""
    found = [Entry(EXTENDS, "text, or null", "null", EXTENDS_MEANING)]
    for key, field in FIELDS.items():
        found.append(_entry(key, field))
        if item := _item(field):
            found += [_entry(f"{key}[].{name}", inner) for name, inner in item.model_fields.items()]
    return found


def _entry(key: str, field: FieldInfo) -> Entry:
    default = REQUIRED if field.is_required() else in_line(field.default)
    return Entry(key, kind_of(field), default, field.description, choices_of(field))


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """What may be written, where that is one of a few words."""
    return next((_words(option) for option in _options(field.annotation) if _words(option)), ())


def kind_of(field: FieldInfo) -> str:
    """The type in words, with what a value must hold to."""
    return _kind(field.annotation, field.metadata)


def _item(field: FieldInfo) -> type[BaseModel] | None:
    """The section that the elements of a list are: the sources of a mixture."""
    lists = [option for option in _options(field.annotation) if get_origin(option) is list]
    items = [item for option in lists for item in get_args(option)]
    return next((i for i in items if isinstance(i, type) and issubclass(i, BaseModel)), None)


def _options(annotation: Any) -> Sequence[Any]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _words(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _kind(annotation: Any, metadata: Sequence[Any]) -> str:
    options = _options(annotation)
    if len(options) > 1:
        kinds = [_kind(option, metadata) for option in options if option is not NoneType]
        return " or ".join(kinds) + (", or null" if NoneType in options else "")
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [*_flat(more), *metadata])
    if words := _words(annotation):
        return " | ".join(words)
    if get_origin(annotation) is list:
        return f"list of {_number_of(metadata)}{_kind(get_args(annotation)[0], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{annotation.__name__.lower()} section"
    return f"{_type(annotation, metadata)} {_bounds(metadata)}".rstrip()


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    """Metadata with that of each `Field(...)` in place of it."""
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


def _type(annotation: Any, metadata: Sequence[Any]) -> str:
    is_path = any(isinstance(part, AfterValidator) and part.func is expand_path for part in metadata)
    can_be_empty = annotation is str and not any(isinstance(part, MinLen) for part in metadata)
    return ("path" if is_path else TYPES[annotation]) + (" (or empty)" if can_be_empty else "")


def _bounds(metadata: Sequence[Any]) -> str:
    parts = [part for part in metadata if type(part) in BOUNDS]
    return " and ".join(f"{BOUNDS[type(p)][1]} {getattr(p, BOUNDS[type(p)][0]):g}" for p in parts)


def _number_of(metadata: Sequence[Any]) -> str:
    least = next((part.min_length for part in metadata if isinstance(part, MinLen)), 0)
    most = next((part.max_length for part in metadata if isinstance(part, MaxLen)), None)
    return f"{least}: " if least == most else f"{least} or more: " if least else ""


# What goes with what


def rules(key: str) -> list[str]:
    """The rules between this key and others of its section, as far as the schema has them in tables."""
    section, _, name = key.rpartition(".")
    found = [
        f"has an effect only with {section}.{other}={' or '.join(values)}"
        for other, values in _used_with(section).get(name, {}).items()
    ]
    for one, concerned, other, allowed, why in MASK_GOES_WITH if section == "mask" else ():
        if name in (one, other):
            needed = f"needs mask.{other}={' or '.join(allowed)}"
            found.append(f"mask.{one}={' or '.join(concerned)} {needed}: {why}")
    return found


def takes(key: str, choice: str) -> list[str]:
    """The keys that this choice gives an effect."""
    section, _, name = key.rpartition(".")
    return [
        f"{section}.{needy}" for needy, needs in _used_with(section).items() if choice in needs.get(name, ())
    ]


def _used_with(section: str) -> dict[str, dict[str, tuple]]:
    used_with = {"mask": MASK_USED_WITH, "data": DATA_USED_WITH, "optimizer": OPTIMIZER_USED_WITH}
    return used_with.get(section, {})


# Printing


def print_reference(console: Console, wanted: str | None = None) -> None:
    """Print all keys, those of a section, or one. To a file or a pipe as one line a key. Raises UserError."""
    everything = entries()
    wanted = wanted and wanted.rstrip(".")
    shown = [e for e in everything if wanted is None or wanted == e.key or e.key.startswith(f"{wanted}.")]
    if not shown:
        raise _unknown(wanted, everything)
    if shown[0].key == wanted:
        width = console.width if console.is_terminal else 10_000
        console.print(_in_detail(shown[0], width), soft_wrap=True)
        shown = [e for e in everything if e.key.startswith(f"{wanted}[].")]
    if console.is_terminal:
        console.print(*_tables(shown), sep="\n", end="")
    elif shown:
        console.print(as_text(shown), markup=False, highlight=False, soft_wrap=True)


def as_text(shown: list[Entry]) -> str:
    """One line a key, for grep and for comparing."""
    return "\n".join(f"{e.key} ({e.kind}; {_default(e)}): {e.meaning}" for e in shown)


def _default(entry: Entry) -> str:
    return REQUIRED if entry.default == REQUIRED else f"default {entry.default}"


def _tables(shown: list[Entry]) -> Iterator[Group]:
    """A table a section."""
    for section in dict.fromkeys(entry.section for entry in shown):
        table = Table("key", "type", "default", "meaning", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.columns[0].no_wrap, table.columns[0].style = True, "cyan"
        for entry in (e for e in shown if e.section == section):
            table.add_row(*map(Text, (entry.name, entry.kind, entry.default, entry.meaning)))
        yield Group(Text(_title(section), style="bold"), table, "")


def _title(section: str) -> str:
    return f"{section}: {description_of(section)}" if section in SECTIONS else section


def description_of(section: str) -> str:
    """What a section is about."""
    parent, _, name = section.rpartition(".")
    return (SECTIONS[parent] if parent else Recipe).model_fields[name].description


def _in_detail(entry: Entry, width: int) -> Text:
    """A key with its type, its choices, its default and its rules, each on a line or more."""
    lines = [("choices", _choice(entry, choice)) for choice in entry.choices]
    if not entry.choices:
        lines = [("type", entry.kind), ("default", entry.default)]
    lines += [("rules", rule) for rule in rules(entry.key)]
    text, last = Text(f"{entry.key}: {entry.meaning}\n", "bold"), None
    for label, line in lines:
        wrapped = textwrap.wrap(line, max(width - 11, 20), break_on_hyphens=False)
        text.append(f"  {'' if label == last else label:<9}", "not bold")
        text.append(f"\n{'':11}".join(wrapped) + "\n", "not bold")
        last = label
    return text


def _choice(entry: Entry, choice: str) -> str:
    notes = ["the default"] if choice == entry.default else []
    if keys := takes(entry.key, choice):
        notes.append(f"takes {', '.join(keys)}")
    return f"{choice}  ({'; '.join(notes)})" if notes else choice


def _unknown(wanted: str, everything: list[Entry]) -> UserError:
    keys = [*SECTIONS, *(entry.key for entry in everything)]
    section, _, name = wanted.rpartition(".")
    alike = {_leaf(key): key for key in reversed(keys) if section not in SECTIONS or _parent(key) == section}
    guesses = [key for key in keys if _leaf(key) == name] or [alike[leaf] for leaf in closest(name, alike)]
    lists = f"speft schema{f' {section}' if section in SECTIONS else ''} lists what there is"
    fix = f"did you mean {' or '.join(guesses)}?" if guesses else lists
    return UserError(f"unknown key {wanted}", "command line", fix)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


# For editors


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe's file. Nothing is required: a recipe that it extends may have it."""
    schema = Recipe.model_json_schema()
    del schema["properties"]["name"]  # set by the file's name
    extends = {"type": "string", "minLength": 1, "description": EXTENDS_MEANING}
    schema["properties"] = {EXTENDS: extends, **schema["properties"]}
    for node in (schema, *(schema["$defs"][section.__name__] for section in SECTIONS.values())):
        node.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
