"""Formats: from a row of a data set to a conversation, as the recipe says. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from speft_ds.config.data_config import Columns, Source, template_fields
from speft_ds.data.conversations import (
    COMPLETE,
    EmptyRow,
    Example,
    conversation_columns,
    encodable,
    read_conversation,
)
from speft_ds.errors import UserError, closest

# format -> the column of the response, or of all that the loss is on
OUTPUT = {
    "prompt_completion": "response",
    "alpaca": "output",
    "classification": "label",
    "messages": "messages",
    "text": "text",
}
# The prompts of Stanford Alpaca with a line end behind, as its data set's own `text` column has them.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# format -> its template, and the one for rows without an input. Inside a chat template the model knows
# by the turns who speaks, so the headings are left out.
PLAIN = {
    "prompt_completion": ("{prompt}", None),
    "alpaca": (_ALPACA_WITH_INPUT, _ALPACA),
    "classification": ("{text}", None),
}
CHAT = {**PLAIN, "alpaca": ("{instruction}\n\n{input}", "{instruction}")}


@dataclass(frozen=True)
class Classes:
    """The names of a classification's classes, and what a row's label column may hold -> its class."""

    names: list[str]
    numbers: Mapping[str | int, int]

    @classmethod
    def named(cls, names: list[str]) -> Classes:
        """Classes that the recipe names: rows hold a name or its number (as text, too).

        Where a name is itself a number, like that of five stars, a number in a row is a name.
        """
        by_name = {name: i for i, name in enumerate(names)}
        if any(name.isdecimal() for name in names):
            return cls(names, by_name | {int(name): i for name, i in by_name.items() if name.isdecimal()})
        return cls(names, {written: i for i in range(len(names)) for written in (i, str(i))} | by_name)


def columns_of(source: Source) -> dict[str, str]:
    """The columns that every row needs -> the recipe key that names each."""
    roles = [OUTPUT[source.format]]
    if source.format in PLAIN:
        templates = _templates(source)
        fields = [name for template in templates for name in template_fields(template)]
        roles = [*fields, *(["input"] if len(templates) > 1 else []), *roles]
    known = Columns.model_fields
    return {_column(source, r): f"data.columns.{r}" if r in known else "data.template" for r in roles}


def _templates(source: Source) -> list[str]:
    """The template of a source; where its rows may have an input, that for rows with one is before it."""
    template, without_input = (CHAT if source.chat_template else PLAIN)[source.format]
    if source.template is not None:
        template, without_input = source.template, source.template_no_input
    if without_input is None:
        return [template]
    return [without_input] if source.columns.input is None else [template, without_input]


def _column(source: Source, role: str) -> str:
    """The column that a field of a template, or the response, is in: its own name unless renamed."""
    return dict(source.columns).get(role) or role


def check_columns(row: Any, where: str, source: Source) -> list[UserError]:
    """What is wrong with the columns of a row."""
    if not isinstance(row, dict):
        return [UserError("a row is not a JSON object", where, "each row is like {column: text, ...}")]
    if conversation_columns(row, source):
        return []
    missing = {column: key for column, key in columns_of(source).items() if column not in row}
    return [_no_column(column, key, where, list(row)) for column, key in missing.items()]


def _no_column(column: str, key: str, where: str, columns: list[str]) -> UserError:
    if key == "data.template":
        what = f"the row has no column {column!r}, a field of data.template"
        return UserError(what, where, f"use its columns as fields: {', '.join(columns)}")
    guess = closest(column, columns)
    fix = f"did you mean {key}={guess[0]}?" if guess else f"type {key}=COLUMN, one of: {', '.join(columns)}"
    if key == "data.columns.input":
        fix += "; or give every row the key; data.columns.input=null where no row has an input"
    return UserError(f"the row has no column {column!r}, named by {key}", where, fix)


def make_example(row: Any, where: str, source: Source, classes: Classes | None, classify: bool) -> Example:
    """A row of a source as a conversation.

    Args:
        classes: of format `classification`.
        classify: for sequence classification: the label is a class, not a response.
    Raises:
        EmptyRow: prompt or response is empty.
        UserError: a column is missing or does not hold what the format says.
    """
    if problems := check_columns(row, where, source):
        raise problems[0]
    if columns := conversation_columns(row, source):
        return read_conversation(row, columns, where, source)
    column = _column(source, OUTPUT[source.format])
    if source.format == "text":
        return Example([_response(row, column, where)], is_chat=False)
    prompt = _turn("user", _prompt(row, where, source))
    if source.format != "classification":
        return Example([prompt, _response(row, column, where)], source.chat_template)
    number = _class(row[column], where, classes)
    if classify:
        return Example([prompt], source.chat_template, number)
    return Example([prompt, _turn("assistant", classes.names[number])], source.chat_template)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _prompt(row: dict, where: str, source: Source) -> str:
    *with_input, template = _templates(source)
    if with_input and not _is_blank(row[source.columns.input]):
        template = with_input[0]
    values = {name: _text(row, _column(source, name), where) for name in template_fields(template)}
    if values and not any(values.values()):
        raise EmptyRow(f"the prompt is empty: {', '.join(values)}", where, COMPLETE)
    return template.format_map(values)  # braces of a value stay as they are


def _text(row: dict, column: str, where: str) -> str:
    """The text in a column of a row, or that of a number; "" for an empty cell."""
    value = row[column]
    if _is_blank(value):
        return ""
    if isinstance(value, str):
        return encodable(value, where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kind = type(value).__name__
    raise UserError(f"{column!r} holds a {kind}, not text", where, "write text there, or name another column")


def _response(row: dict, column: str, where: str) -> dict[str, str]:
    if text := _text(row, column, where):
        return _turn("assistant", text)
    raise EmptyRow(f"the row has an empty {column!r}", where, COMPLETE)


def _is_blank(value: Any) -> bool:
    """Whether a cell is empty: no value, white space, or the NaN of a table's missing values."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _class(value: Any, where: str, classes: Classes) -> int:
    if _is_blank(value):
        raise EmptyRow("the row has no label", where, COMPLETE)
    if _may_be_label(value) and value in classes.numbers:
        return classes.numbers[value]
    names = ", ".join(classes.names)
    fix = f"data.labels names the classes in order; a row holds a name or a number: {names}"
    raise UserError(f"the label {value!r} is not one of data.labels", where, fix)


def _may_be_label(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def find_classes(rows: Iterable[tuple[str, Any, str]]) -> Classes:
    """The distinct labels of the rows, sorted (numbers by value), as classes; empty ones are left out.

    Args:
        rows: where each stands, the row, and the column of its label.
    Raises:
        UserError: a label that is no class, labels of two kinds, or fewer than two labels.
    """
    found: set[str | int] = set()
    for where, row, column in rows:
        has_column = isinstance(row, dict) and column in row
        if has_column and _is_blank(row[column]):
            continue  # refused or left out when its row is read
        if not has_column or not _may_be_label(row[column]):
            has = repr(row[column]) if has_column else "no such column"
            fix = f"data.columns.label names a column of texts or whole numbers; the row has {has}"
            raise UserError(f"the row has no label in {column!r}", where, fix)
        found.add(row[column])
    where = "data.columns.label"
    if len({type(value) for value in found}) > 1:
        raise UserError("labels are numbers in some rows, texts in others", where, "name them: data.labels")
    if len(found) < 2:
        fix = f"classification needs two or more; {where} names their column"
        raise UserError(f"the rows have {len(found)} different label(s)", where, fix)
    values = sorted(found)
    if all(str(value).isdecimal() for value in values):  # the numbers of a .csv file are texts
        values.sort(key=int)
    return Classes([str(value) for value in values], {value: i for i, value in enumerate(values)})
