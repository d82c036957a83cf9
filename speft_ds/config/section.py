"""What the values of a recipe may be, and how a broken rule is told."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from speft_ds.env import expand_path


def _number(value: Any) -> Any:
    # YAML 1.1, which PyYAML speaks, reads 1e-3 as text: a float there needs a dot and a signed exponent.
    is_exponent = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_exponent else value


def exactly_one(value: Any, info: ValidationInfo, section: str, other: str) -> Any:
    """Refuse both and neither. Silent where `other` is itself wrong: that is reported already."""
    if other in info.data and (value is None) == (info.data[other] is None):
        both = f"{section}.{info.field_name} and {section}.{other} are both"
        if value is None:
            raise broken_rule(f"{both} null: one is needed", f"give {section}.{other} a value")
        fix = "keep one; one on the command line sets the other aside"
        raise broken_rule(f"{both} given, and they exclude each other", fix)
    return value


def switch_off(data: Any, key: str, other: str) -> Any:
    """A section's raw values, in which giving `other` sets the default of `key` aside."""
    given = isinstance(data, dict) and data.get(other) is not None
    return {key: None, **data} if given else data


def refuse_without_effect(
    section: str,
    cls: type[BaseModel],
    used_with: dict[str, dict[str, tuple]],
    value: Any,
    info: ValidationInfo,
    even_if_given: bool = False,
) -> None:
    """Refuse a value other than the default where no other key gives it an effect.

    Args:
        used_with: key -> keys declared before it, and their values that give it an effect.
        even_if_given: refuse it beside another key that was chosen by hand, too. By default that is taken
            for a recipe in which one line was changed, not for one that forgot the key.
    """
    key, default = info.field_name, cls.model_fields[info.field_name].default
    given = (info.context or {}).get("given", ())
    for other, values in used_with[key].items():
        chosen = info.data.get(other, values[0])  # absent where it is itself wrong
        is_forgotten = even_if_given or f"{section}.{other}" not in given
        if value != default and chosen not in values and is_forgotten:
            message = f"{section}.{key}={value} has no effect with {section}.{other}={chosen}"
            fix = f"{section}.{key}={_typed(default)}, its default"
            raise broken_rule(message, f"{fix}, or {section}.{other}={' or '.join(values)}")


def _typed(value: Any) -> str:
    """As the command line takes it, unquoted."""
    return "null" if value is None else str(value).replace(", ", ",")


def broken_rule(message: str, fix: str, **context: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{message}", {"message": message, "fix": fix, **context})


def _interval(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is None or is_steps or (isinstance(value, str) and _MINUTES.fullmatch(value)):
        return value
    fix = "a number of steps, like 100, or of minutes, like '15 minutes'; null: never"
    raise broken_rule(f"{value!r} is neither steps nor minutes", fix)


_MINUTES = re.compile(r"([1-9]\d*) ?min(ute)?s?")


def split_interval(value: int | str | None) -> tuple[int | None, float | None]:
    """An `Interval` as (steps, seconds), of which one at most is not None."""
    if isinstance(value, str):
        return None, 60.0 * int(_MINUTES.fullmatch(value).group(1))
    return value, None


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(expand_path)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]
Shots = Annotated[int, Field(ge=0)]
# Steps, or text like `15 minutes`, or never.
Interval = Annotated[int | Text | None, BeforeValidator(_interval)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[list[Layer], Field(min_length=2, max_length=2)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


class ConfigSection(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
