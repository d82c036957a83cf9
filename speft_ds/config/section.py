"""The base of a recipe's sections, and the rules between the keys of a section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


def broken_rule(message: str, fix: str, key: str | None = None) -> PydanticCustomError:
    """What a validator raises; `key`: the one to blame, where it is not the one that is validated."""
    context = {"message": message, "fix": fix}
    return PydanticCustomError("rule", "{message}", context | ({"key": key} if key else {}))


def given_keys(info: ValidationInfo) -> set[str]:
    """The keys, in full, that a file or the command line gives a value."""
    return set((info.context or {}).get("given", ()))


# Rules, written beside the type of a key. They look at earlier keys of the section; one that is missing from
# `info.data` is itself wrong, and reported already.


@dataclass(frozen=True)
class Needs:
    """Values of a key that need an earlier key to have one of these values.

    Attributes:
        some: the values that do; empty: all but the default, for they would have no effect.
        even_if_given: refuse them where the earlier key was set by hand, too. A key without effect is
            otherwise taken for the rest of a recipe in which one line was changed.
        unless: a key that, once it has a value, takes the rule away.
        is_needed: where the earlier key has one of these values, null is refused.
    """

    other: str
    values: tuple[Any, ...]
    some: tuple[Any, ...] = ()
    why: str = "it would have no effect"
    even_if_given: bool = False
    unless: str | None = None
    is_needed: bool = False

    def concerns(self, value: Any, default: Any) -> bool:
        return value in self.some if self.some else value != default

    def check(self, section: type[ConfigSection], value: Any, info: ValidationInfo) -> None:
        own, other = f"{section.key()}.{info.field_name}", f"{section.key()}.{self.other}"
        field, chosen = section.model_fields[info.field_name], info.data.get(self.other, self.values[0])
        if self.is_needed and value is None and info.data.get(self.other) in self.values:
            fix = f"{own}=...  ({field.description}), or {other}={section.model_fields[self.other].default}"
            raise broken_rule(f"{other}={chosen} needs {own}", fix)
        is_excused = not self.some and not self.even_if_given and other in given_keys(info)
        is_excused = is_excused or info.data.get(self.unless) is not None
        if not self.concerns(value, field.default) or chosen in self.values or is_excused:
            return
        choices = get_args(field.annotation) or (True, False)
        fits = [choice for choice in choices if choice not in self.some] if self.some else [field.default]
        what = f"{own}={_typed(value)} does not go with {other}={_typed(chosen)}: {self.why}"
        fix = f"{other}={' or '.join(map(_typed, self.values))}, or {own}={' or '.join(map(_typed, fits))}"
        raise broken_rule(what, fix)

    def describe(self, section: str, key: str) -> str:
        own = f"{section}.{key}"
        needed = f"{section}.{self.other}={' or '.join(map(_typed, self.values))}"
        if not self.some:
            return f"{own} has an effect only with {needed}"
        return f"{own}={' or '.join(map(_typed, self.some))} needs {needed}: {self.why}"


@dataclass(frozen=True)
class InPlaceOf:
    """The key takes the place of an earlier one, which loses its default; `is_needed`: one of the two is."""

    other: str
    is_needed: bool = True

    def check(self, section: type[ConfigSection], value: Any, info: ValidationInfo) -> None:
        if self.other not in info.data or (value is None) != (info.data[self.other] is None):
            return
        own, other = (f"{section.key()}.{key}" for key in (info.field_name, self.other))
        if value is not None:
            fix = "keep one; one on the command line sets the other aside"
            raise broken_rule(f"{own} and {other} are both given, and they exclude each other", fix)
        if self.is_needed:
            raise broken_rule(f"{own} and {other} are both null: one is needed", f"give {other} a value")

    def describe(self, section: str, key: str) -> str:
        return f"{section}.{key} takes the place of {section}.{self.other}"


def rules_of(field: FieldInfo) -> list[Needs | InPlaceOf]:
    return [rule for rule in field.metadata if isinstance(rule, Needs | InPlaceOf)]


def _typed(value: Any) -> str:
    """As the command line takes it, unquoted."""
    text = str(value).replace(", ", ",")
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


class ConfigSection(BaseModel):
    """A section of a recipe. Unknown keys are refused; the docstring below a key is what it means."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def key(cls) -> str:
        """Of the section in a recipe: `mask` of MaskConfig."""
        return cls.__name__.removesuffix("Config").removesuffix("Section").lower()

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, values: Any) -> Any:
        for key, field in cls.model_fields.items():
            for rule in rules_of(field):
                if isinstance(rule, InPlaceOf) and isinstance(values, dict) and values.get(key) is not None:
                    values = {rule.other: None, **values}
        return values

    @field_validator("*")
    @classmethod
    def _rules(cls, value: Any, info: ValidationInfo) -> Any:
        for rule in rules_of(cls.model_fields[info.field_name]):
            rule.check(cls, value, info)
        return value
