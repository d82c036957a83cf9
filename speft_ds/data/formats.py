"""Formats: from a row of a data set to a conversation, as the recipe says. Imports no torch."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from speft_ds.config.data_config import Columns, Source, template_fields
from speft_ds.data.bad_rows import BadRows, report
from speft_ds.data.conversations import (
    COMPLETE,
    EmptyRow,
    Example,
    conversation_columns,
    encodable,
    read_conversation,
)
from speft_ds.data.readers import NamedClass, kind_of
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


# A number without a fraction, short enough to be one; 018 is a text.
_INTEGRAL = re.compile(r"[+-]?(0|[1-9]\d{0,99})(\.0+)?")


@dataclass(frozen=True)
class Classes:
    """The names of a classification's classes, and what a label is called (`label_text`) -> its class."""

    names: list[str]
    numbers: Mapping[str, int]

    @classmethod
    def named(cls, names: list[str]) -> Classes:
        """Classes that the recipe names: rows hold a name or its number (as text, too).

        Where a name is itself a number, like that of five stars, a number in a row is a name.
        """
        names = [name.strip() for name in names]
        by_name = {label_text(name): i for i, name in enumerate(names)}
        if len(by_name) < len(names) or None in by_name:
            what = "data.labels has an empty name, or one name twice"
            raise UserError(what, "data.labels", "remove it: trimmed, and as numbers, names have to differ")
        if any(map(_is_number, by_name)):
            return cls(names, by_name)
        return cls(names, {str(i): i for i in range(len(names))} | by_name)

    def number_of(self, label: Any) -> int | None:
        """The class of a row's label; None: it is none of them."""
        if isinstance(label, NamedClass) and not any(
            label_text(name) in self.numbers for name in label.names
        ):
            label = int(label)  # the recipe has names of its own for all of them
        return self.numbers.get(label_text(label))


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
    if row == {}:
        return [UserError("a row has no columns", where, "complete or delete it")]
    if not isinstance(row, dict):
        return [UserError("a row is not a JSON object", where, "each row is like {column: text, ...}")]
    if conversation_columns(row, source):
        return []
    needed = columns_of(source)
    missing = {column: key for column, key in needed.items() if column not in row}
    problems = [_no_column(column, key, where, list(row)) for column, key in missing.items()]
    is_table = kind_of(where.rpartition(":")[0]) in (".csv", ".tsv")
    if is_table and len(missing) == len(needed):
        hint = f"; if the first line is a row, write a header above it: {','.join(needed)}"
        return [UserError(problem.what, problem.where, problem.fix + hint) for problem in problems]
    return problems


def check_row(row: Any, where: str, source: Source) -> None:
    """Raises UserError where something is wrong with the columns of a row."""
    if problems := check_columns(row, where, source):
        fixes = "; ".join(problem.fix for problem in problems)
        raise UserError("; ".join(problem.what for problem in problems), where, fixes)


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
    check_row(row, where, source)
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
    if (number := classes.number_of(value)) is not None:
        return number
    # As JSON, which is YAML too: a bare yes, no or 1 would be none of the names.
    names = shlex.quote(f"data.labels={json.dumps(classes.names, ensure_ascii=False)}")
    fix = f"correct the row, or name all classes in order; now they are {names}"
    raise UserError(f"the label {_shown(value)} is not one of data.labels", where, fix)


def _shown(label: Any) -> str:
    return repr(str(label)) if isinstance(label, str | NamedClass) else str(label)


def label_text(value: Any) -> str | None:
    """What a label is called: its trimmed text, and 1 for 1, 1.0 and "1.0"; None: no label can be like that.

    True and False are called as in JSON.
    """
    if isinstance(value, bool | NamedClass | str):
        text = str(value).strip()
        if text.lower() in ("true", "false"):
            return text.lower()
        return str(int(text.partition(".")[0])) if _INTEGRAL.fullmatch(text) else text or None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(float(value))
    return None


def _is_number(text: str) -> bool:
    """Whether a label's text is that of a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def find_classes(rows: Iterable[tuple[str, Any, str]], bad: BadRows | None = None) -> Classes:
    """The distinct labels of the rows as classes, sorted (numbers by value; ClassLabel by its own numbers).

    Empty labels are left out.

    Args:
        rows: where each stands, the row, and the column of its label.
        bad: takes the errors of rows with a label that is no class, in place of raising the first.
    Raises:
        UserError: a label that is no class, labels of two kinds, or fewer than two labels.
    """
    found: dict[str, Any] = {}  # a label of each text
    has_values = False
    for where, row, column in rows:
        has_column = isinstance(row, dict) and column in row
        if has_column and _is_blank(row[column]):
            continue  # refused or left out when its row is read
        text = label_text(row[column]) if has_column else None
        if text is None:
            has = repr(row[column]) if has_column else "no such column"
            fix = f"data.columns.label names a column of texts, numbers or true and false; the row has {has}"
            report(UserError(f"the row has no label in {column!r}", where, fix), bad)
            continue
        found.setdefault(text, row[column])
        has_values = has_values or not isinstance(row[column], str | NamedClass)
    where = "data.columns.label"
    kinds = sorted({_kind_of_label(text) for text in found})
    if has_values and len(kinds) > 1:
        what = f"labels are {' in some rows, '.join(kinds)} in others"
        raise UserError(what, where, "write them alike, or name the classes: data.labels")
    if len(found) < 2:
        fix = f"classification needs two or more; {where} names their column"
        raise UserError(f"the rows have {len(found)} different label(s)", where, fix)
    names = sorted(found)
    if all(isinstance(label, NamedClass) for label in found.values()):
        names.sort(key=lambda name: int(found[name]))
    elif all(map(_is_number, names)):  # the numbers of a .csv file are texts
        names.sort(key=float)
    return Classes(names, {name: i for i, name in enumerate(names)})


def _kind_of_label(text: str) -> str:
    return "numbers" if _is_number(text) else "booleans" if text in ("true", "false") else "texts"
