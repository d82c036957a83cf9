"""Types of a recipe's values: numbers with bounds, texts, paths, intervals."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from speft_ds.config.section import broken_rule
from speft_ds.env import expand_path
from speft_ds.untrusted import MAX_NAME

# Formats of a frozen base in few bits; speft_ds/model/codecs has a codec for each.
BASE_FORMATS = ("int8", "bfp8", "bfp6", "bfp4", "nf4", "mxfp6", "mxfp4")

MAX_MULTIPLE = 256  # of a vocabulary that was padded for the products of the head

_MINUTES = re.compile(r"([1-9]\d*) ?min(ute)?s?")


def _number(value: Any) -> Any:
    # YAML 1.1, which PyYAML speaks, reads 1e-3 as text: a float there needs a dot and a signed exponent.
    is_exponent = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_exponent else value


def _interval(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is None or is_steps or (isinstance(value, str) and _MINUTES.fullmatch(value)):
        return value
    fix = "a number of steps, like 100, or of minutes, like '15 minutes'; null: never"
    raise broken_rule(f"{value!r} is neither steps nor minutes", fix)


def _path(value: str) -> str:
    # A path is printed, and written into job scripts, where a line break would begin a command.
    if not value.isprintable():
        raise broken_rule(
            f"{value!r} has control characters in it", "a path without line breaks and the like"
        )
    path = expand_path(value)
    if any(len(name.encode()) > MAX_NAME for name in path.split("/")):
        what = f"{value:.40}... has a name of more than {MAX_NAME} bytes in it"
        raise broken_rule(what, "a path whose names are shorter: no folder holds this one")
    return path


def _limit(value: float) -> float:
    if 0 < value < 1:
        return value
    if value >= 1 and value == int(value):
        return int(value)
    raise broken_rule(
        f"{value} is neither a number of documents nor a share", "a number, like 100, or a share, like 0.1"
    )


def split_interval(value: int | str | None) -> tuple[int | None, float | None]:
    """An `Interval` as (steps, seconds), of which one at most is not None."""
    if isinstance(value, str):
        return None, 60.0 * int(_MINUTES.fullmatch(value).group(1))
    return value, None


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[
    Text,
    AfterValidator(_path),
    WithJsonSchema({"type": "string", "format": "path", "minLength": 1}),
]
NUMBER = BeforeValidator(_number)
NonNegative = Annotated[float, Field(ge=0), NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
Share = Annotated[float, Field(gt=0, le=1), NUMBER]
PartialShare = Annotated[float, Field(gt=0, lt=1), NUMBER]
Decay = Annotated[float, Field(ge=0, lt=1), NUMBER]
Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Interval = Annotated[int | Text | None, BeforeValidator(_interval)]  # steps, text like `15 minutes`, or never
Limit = Annotated[int | float, NUMBER, AfterValidator(_limit)]  # documents, or below 1 the share of them
