"""Errors that a user can act on: what is wrong, where, and what to type. Shown without a traceback."""

import difflib
import errno
import json
import re
import reprlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from speft_ds.untrusted import printable

T = TypeVar("T")


class UserError(Exception):
    """One problem that the user can fix.

    Args:
        can_go_on: once it is mended, the run can go on from its last checkpoint.
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None, can_go_on: bool = True):
        super().__init__(what, where, fix, can_go_on)
        self.what, self.where, self.fix, self.can_go_on = what, where, fix, can_go_on

    def __str__(self) -> str:
        notes = [("where", self.where), ("fix", self.fix)]
        return printable("\n".join([self.what, *(f"    {label}: {text}" for label, text in notes if text)]))


# What a path may be to blame for: too long, no right to it, a file for a folder, links in a circle.
OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EROFS}


def of_a_path(error: OSError) -> UserError:
    """What was wrong with a path that the user named. Raises the error itself where that is not to blame."""
    if error.errno not in OF_A_PATH or error.filename is None:
        raise error
    return UserError(f"{error.strerror}: {error.filename!s:.100}", "command line", "name another path")


class RecipeError(UserError):
    """All the problems of a recipe at once, so that one run shows everything there is to fix."""

    def __init__(self, problems: Sequence[UserError], title: str = "recipe"):
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
        super().__init__(f"{title}: {count}", can_go_on=False)
        self.args = (list(problems), title)  # what a copy in another process is built from
        self.problems = list(problems)

    def __str__(self) -> str:
        numbered = (f"{number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return "\n".join([self.what, *(f"  {text}".replace("\n", "\n  ") for text in numbered)])


def gather(calls: Iterable[Callable[[], T]], title: str) -> list[T]:
    """What each of the calls returns. Raises RecipeError: the problems of all of them, each once."""
    found, problems = [], {}
    for call in calls:
        try:
            found.append(call())
        except UserError as error:
            problems |= {str(each): each for each in getattr(error, "problems", [error])}
    if problems:
        raise RecipeError(list(problems.values()), title)
    return found


def shell(*words: object) -> str:
    """A command that can be pasted into a shell, whatever its words hold."""
    return shlex.join(map(str, words))


def closest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to two choices that the word may have been meant as, of at least this similarity in [0, 1]."""
    return difflib.get_close_matches(str(word), list(choices), n=2, cutoff=cutoff)


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """A question that names the closest choices or, where none is close, the list of all of them."""
    choices = list(choices)
    if close := closest(word, choices):
        return f"did you mean {' or '.join(close)}?"
    return f"choose from: {', '.join(choices)}" if choices else "there is nothing to choose from"


def explain(
    error: Mapping[str, Any], sources: Mapping[str, str], file: str, fields: Mapping[str, Any]
) -> UserError:
    """Turn one pydantic error into a UserError. `fields`: pydantic's FieldInfo by key like `mask.density`."""
    context, value = error.get("ctx", {}), error["input"]
    # As a user writes it: `mask.layers[0]`.
    label = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    # The schema's key: of `data.mixture[0].path`, which the user wrote inside a list, data.mixture.
    key = context.get("key") or label.partition("[")[0]
    # A rule may name a part of a list, whose line is known where it stands in a file.
    where = sources.get(context.get("key", label)) or sources.get(key.partition("[")[0], f"{file} ({key})")
    if "fix" in context:  # raised by a rule of ours, which words it itself
        return UserError(error["msg"], where, context["fix"])
    about = fields[key].description
    if error["type"] == "extra_forbidden":
        return UserError(f"unknown key {label}", where, f"{key} is {about}")
    if error["type"] == "missing" and "[" in label:
        return UserError(f"{label} is missing", where, f"{key} is {about}")
    if error["type"] == "missing" and key not in sources:
        return UserError(f"{key} is missing", where, f"add it, or type {key}=...  ({about})")
    message = error["msg"].replace("Input should be", "must be")
    shown = "null" if value is None else reprlib.repr(value)
    what = f"{label} is {shown}: {message[0].lower()}{message[1:]}"
    if error["type"] == "literal_error":
        return UserError(what, where, did_you_mean(value, re.findall(r"'([^']*)'", context["expected"])))
    unquote = isinstance(value, str) and error["type"] in ("int_type", "float_type")
    default = None if fields[key].is_required() else fields[key].default
    example = f"{key} is {about}" if default is None else f"like {key}={json.dumps(default)}  ({about})"
    return UserError(what, where, f"{'a number without quotes; ' if unquote else ''}{example}")
