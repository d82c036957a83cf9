"""The file of a study: a recipe, what is varied, and what the runs are compared by. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, PrivateAttr

from speft_ds.config.load_recipe import as_override, guess_key, read_draft, shown
from speft_ds.config.recipe import FIELDS, SECTIONS
from speft_ds.config.section import ConfigSection
from speft_ds.config.values import NUMBER, Count, Index, Positive, Text
from speft_ds.errors import RecipeError, UserError, did_you_mean, explain

RATE, SEED = "optimizer.lr", "seed"
VALIDATION_LOSS = "validation_loss"
Overrides = dict[Text, Any]


class RatesConfig(ConfigSection):
    """Learning rates, tried with the first seed until the best one is not at the edge."""

    start: Annotated[list[Positive], Field(min_length=1)]
    """the rates that are tried first"""
    variants: dict[Text, Annotated[list[Positive], Field(min_length=1)]] = Field({})
    """by variant: other rates to try first than those of start"""
    factor: Annotated[float, Field(gt=1), NUMBER] = 3.0
    """from the rate at the edge to the next one"""
    most: Count = 7
    """rates that are tried at most, with those of the start"""
    tolerance: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.01
    """of the best value: as much worse are the rates of its plateau, at most"""

    def first(self, variant: str) -> list[float]:
        return self.variants.get(variant, self.start)


class StudyConfig(ConfigSection):
    """A study, checked as far as that goes without its recipe."""

    recipe: Text
    """a name that `speft ls` lists, or the path of a YAML file"""
    set: Overrides = Field({})
    """keys of the recipe to change in every run"""
    variants: dict[Text, Overrides | None] = Field({})
    """what is compared, by name: the keys to change in each"""
    axes: dict[Text, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """keys of the recipe and their values: every variant is run with every combination"""
    rates: RatesConfig | None = None
    """learning rates to try; null: the recipe's"""
    seeds: list[Index] = Field([])
    """of the runs that are averaged; empty: the recipe's, and no spread"""
    metric: Text = VALIDATION_LOSS
    """what runs are compared by: validation_loss, or a score as TASK/METRIC"""
    reference: Text | None = None
    """a variant, or KEY=VALUE of an axis: what the others are compared with, seed by seed; null: nothing"""
    name: str = "study"
    """the file's name; not a key of the YAML"""
    given: tuple[str, ...] = ()
    """`key=value` of the command line, for every run; not a key of the YAML"""
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """The line of a key."""
        return self._sources.get(key, f"{self.name} ({key})")

    def overrides(self, variant: str, point: Overrides) -> list[str]:
        """`key=value` of a run: of all, of its variant, of the command line, of its point on the axes."""
        own = self.set | (self.variants.get(variant) or {})
        return [*starmap(as_override, own.items()), *self.given, *starmap(as_override, point.items())]

    def sources(self, variant: str) -> dict[str, str]:
        """Key -> where the study gives it a value for a variant's runs."""
        found = {key: self.where(f"set.{key}") for key in self.set}
        found |= {key: self.where(f"variants.{variant}.{key}") for key in self.variants.get(variant) or {}}
        found |= {key: f"command line: {text}" for text in self.given for key in [text.partition("=")[0]]}
        return found | dict(self.varied())

    def varied(self) -> Iterator[tuple[str, str]]:
        """The keys that the axes, rates and seeds set, each with its line."""
        yield from ((key, self.where(f"axes.{key}")) for key in self.axes)
        if self.rates is not None:
            yield RATE, self.where("rates.start")
        if self.seeds:
            yield SEED, self.where("seeds")


def load_study(path: Path, given: Sequence[str] = ()) -> StudyConfig:
    """Read the file of a study.

    Args:
        given: `key=value` of the command line, for every run.
    Raises:
        RecipeError: all its problems, each with its line.
    """
    draft = read_draft(path, "study", "start from one that works: studies/smoke.yaml")
    values, title = draft.values, f"study {path.stem}"
    keys = [key for key in StudyConfig.model_fields if key not in ("name", "given")]
    if isinstance(axes := values.get("axes"), dict) and SEED in axes and "seeds" not in values:
        values["seeds"] = axes.pop(SEED)
        draft.sources["seeds"] = draft.sources.get(f"axes.{SEED}", "axes")
    problems = list(draft.problems)
    for key in values.keys() - set(keys):
        problems.append(UserError(f"unknown key {key}", draft.sources[key], did_you_mean(key, keys)))
        del values[key]
    try:
        study = StudyConfig(**values, name=path.stem, given=tuple(given))
    except pydantic.ValidationError as failed:
        problems += [_explained(error, draft.sources, shown(path)) for error in failed.errors()]
    else:
        study._sources = draft.sources
        problems += _problems(study)
    if problems:
        raise RecipeError(problems, title)
    return study


def _explained(error: Any, sources: dict[str, str], file: str) -> UserError:
    """One of pydantic's errors; what is below a key is explained by the key."""
    first, *others = error["loc"]
    fields = RatesConfig.model_fields if first == "rates" and others else {}
    field = fields.get(others[0] if others else "", StudyConfig.model_fields[first])
    label = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        return UserError(f"unknown key {label}", sources.get(label, file), did_you_mean(others[-1], fields))
    return explain(error, sources, file, {label: field, label.partition("[")[0]: field})


def _problems(study: StudyConfig) -> Iterator[UserError]:
    """Keys that are none of a recipe, or set twice; names that are not there."""
    groups = {"set": study.set, "axes": study.axes}
    groups |= {f"variants.{name}": keys or {} for name, keys in study.variants.items()}
    varied = dict(study.varied())
    for group, keys in groups.items():
        for key in keys:
            where = study.where(f"{group}.{key}")
            if key in SECTIONS:
                example = next(known for known in FIELDS if known.startswith(f"{key}."))
                yield UserError(f"{key} is a section, not a key", where, f"in full, like {example}: ...")
            elif key not in FIELDS:
                yield UserError(f"unknown key {key}", where, guess_key(key))
            elif key == "output_dir":
                yield UserError("every run has a folder of its own", where, "--output FOLDER, for the study")
            elif group != "axes" and key in varied:
                yield UserError(f"{key} is set here and varied, too", where, f"keep one: {varied[key]}")
    for text in study.given:
        if (key := text.partition("=")[0]) in varied:
            yield UserError(f"{key} is what the study varies", f"command line: {text}", varied[key])
    for name in study.rates.variants if study.rates is not None else ():
        if name not in study.variants:
            where, fix = study.where(f"rates.variants.{name}"), did_you_mean(name, study.variants)
            yield UserError(f"no variant is called {name!r}", where, fix)
    if study.rates is not None and RATE in study.axes:
        yield UserError("the learning rate is varied twice", study.where("rates"), f"keep it, or axes.{RATE}")
    if len(set(study.seeds)) < len(study.seeds):
        yield UserError("a seed stands there twice", study.where("seeds"), "each seed once")
    for key, values in study.axes.items():
        if len({as_override(key, value) for value in values}) < len(values):
            yield UserError(f"a value of {key} stands there twice", study.where(f"axes.{key}"), "each once")
    compared = [
        *study.variants,
        *(as_override(key, each) for key, values in study.axes.items() for each in values),
    ]
    if study.reference is not None and study.reference not in compared:
        what, fix = f"nothing is called {study.reference!r}", did_you_mean(study.reference, compared)
        yield UserError(what, study.where("reference"), fix)
