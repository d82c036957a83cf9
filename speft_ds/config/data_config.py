"""The `data` section: which rows, in what format, and how they become sequences."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.data_config import template_fields
from speft_ds.config.section import (
    ConfigSection,
    Count,
    FilePath,
    Float,
    Text,
    broken_rule,
    refuse_without_effect,
)
from speft_ds.errors import UserError


class Columns(ConfigSection):
    """Which column of a row holds what; a format uses some of them."""

    instruction: Text = Field("instruction", description="format alpaca: what to do")
    input: Text | None = Field("input", description="format alpaca: what to do it with; null: no such column")
    output: Text = Field("output", description="format alpaca: the response")
    prompt: Text = Field("prompt", description="format prompt_completion: the prompt")
    response: Text = Field("response", description="format prompt_completion: the response")
    messages: Text = Field("messages", description="format messages: a list of {role, content}")
    text: Text = Field("text", description="formats text and classification: the text")
    label: Text = Field("label", description="format classification: a class, as a name or a number")


Format = Literal["prompt_completion", "alpaca", "messages", "text", "classification"]
COLUMNS = {
    "prompt_completion": ("prompt", "response"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "text": ("text",),
    "classification": ("text", "label"),
}


class Source(ConfigSection):
    """One data set of a mixture; what it leaves out is as the data section says."""

    path: FilePath = Field(description="a file, a folder, or a hub id, as data.path")
    weight: Float | None = Field(None, gt=0, description="its share of an epoch, relative to the others'")
    subset: Text | None = Field(None, description="as data.subset")
    split: Text | None = Field(None, description="as data.split")
    revision: Text | None = Field(None, description="as data.revision")
    format: Format | None = Field(None, description="as data.format")
    columns: Columns | None = Field(None, description="as data.columns")
    template: Text | None = Field(None, description="as data.template")
    template_no_input: Text | None = Field(None, description="as data.template_no_input")
    chat_template: bool | None = Field(None, description="as data.chat_template")

    @field_validator("template", "template_no_input")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        return _readable_template(value)


def _readable_template(value: str | None) -> str | None:
    try:
        template_fields(value or "")
    except UserError as error:
        raise broken_rule(error.what, error.fix) from None
    return value


def _check_source(place: str, own: Source, whole: Source) -> None:
    """Refuse what a source of a mixture says without effect, `whole` being it and what it inherits."""
    for key in ("template", "template_no_input"):
        takes = DATA_USED_WITH[key]["format"]
        if getattr(own, key) is not None and whole.format not in takes:
            message = f"{place}.{key} has no effect with format {whole.format}"
            raise broken_rule(message, f"remove it, or format: {' or '.join(takes)}", key=f"{place}.{key}")
    if whole.template_no_input is not None and whole.template is None:
        message = f"{place}.template_no_input is given without a template"
        raise broken_rule(message, "give both", key=f"{place}.template_no_input")
    if whole.format == "messages" and whole.chat_template is False:
        message = f"{place}: format messages is written by the tokenizer's chat template"
        raise broken_rule(message, "chat_template: true", key=f"{place}.chat_template")


# key of the data section -> an earlier key, and its values that give it an effect
DATA_USED_WITH: dict[str, dict[str, tuple]] = {
    "template": {"format": ("prompt_completion", "alpaca", "classification")},
    "template_no_input": {"format": ("alpaca",)},
    "labels": {"format": ("classification",)},
    "select_rows": {"select": ("longest", "random", "ifd")},
    "scorer": {"select": ("ifd",)},
}


class DataConfig(ConfigSection):
    path: FilePath | None = Field(
        None,
        description="training rows: .json, .jsonl, .csv or .parquet (also .gz, .zst), a folder, or a hub id",
    )
    mixture: list[Source] | None = Field(
        None, min_length=1, description="several data sets in place of path, each {path: ..., weight: ...}"
    )
    subset: Text | None = Field(
        None, description="of a data set in a folder or on the hub: its configuration"
    )
    split: Text = Field("train", description="of a data set in a folder or on the hub: its split")
    revision: Text | None = Field(None, description="of a data set on the hub: branch, tag or commit")
    format: Format = Field("prompt_completion", description="what the columns of a row are")
    columns: Columns = Field(Columns(), description="the names of the columns")
    template: Text | None = Field(
        None, description="the prompt as text with named fields, like 'Q: {question}'; null: the format's own"
    )
    template_no_input: Text | None = Field(
        None, description="format alpaca: the template of rows whose input is empty"
    )
    chat_template: bool = Field(True, description="wrap prompt and response in the tokenizer's chat template")
    labels: list[Text] | None = Field(
        None, min_length=2, description="format classification: the classes in order; null: found in the rows"
    )
    max_length: int = Field(1024, ge=8, description="the most tokens that a row, or a pack of rows, may have")
    long_rows: Literal["drop", "truncate_prompt", "truncate_response"] = Field(
        "drop", description="rows above max_length: left out, cut in the prompt's middle, or at the end"
    )
    empty_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="rows without a prompt or a response: an error, or left out"
    )
    select: Literal["all", "longest", "random", "ifd"] = Field(
        "all", description="which rows: all, the longest responses, random ones, the hardest to follow (IFD)"
    )
    select_rows: Count | None = Field(None, validate_default=True, description="how many rows select takes")
    scorer: FilePath | None = Field(
        None, validate_default=True, description="select ifd: a small language model that scores the rows"
    )
    packing: bool = Field(False, description="several rows in a sequence, each attending to itself alone")

    @field_validator("mixture")
    @classmethod
    def _one_or_many(cls, value: list[Source] | None, info: ValidationInfo) -> list[Source] | None:
        if value is None:
            return None
        if info.data.get("path") is not None:
            fix = "keep one; one on the command line sets the other aside"
            raise broken_rule("data.path and data.mixture are both given, and they exclude each other", fix)
        if len({source.weight is None for source in value}) > 1:
            fix = "give every source a weight, or none: then an epoch has every row once"
            raise broken_rule("data.mixture gives a weight to some of its sources only", fix)
        return value

    @field_validator("columns")
    @classmethod
    def _of_the_format(cls, value: Columns, info: ValidationInfo) -> Columns:
        known, given = info.data.get("format"), (info.context or {}).get("given", ())
        changed = [name for name, column in value if column != Columns.model_fields[name].default]
        for name in changed if known and info.data.get("mixture") is None else ():
            if name not in COLUMNS[known] and "data.format" not in given:
                fix = f"its columns are {', '.join(COLUMNS[known])}; or set data.format"
                what = f"data.columns.{name} has no effect with data.format={known}"
                raise broken_rule(what, fix, key=f"data.columns.{name}")
        return value

    @field_validator("template", "template_no_input")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        return _readable_template(value)

    @field_validator("template_no_input")
    @classmethod
    def _has_its_partner(cls, value: str | None, info: ValidationInfo) -> str | None:
        template = info.data.get("template")
        if value is not None and template is None and "template" in info.data:
            fix = "give both: data.template for rows with an input, data.template_no_input for the others"
            raise broken_rule("data.template_no_input is given without data.template", fix)
        return value

    @field_validator("chat_template")
    @classmethod
    def _messages_need_it(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("format") == "messages":
            fix = "data.chat_template=true, or data.format=prompt_completion with plain columns"
            raise broken_rule("data.format=messages is written by the tokenizer's chat template", fix)
        return value

    @field_validator(*DATA_USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("mixture") is None or info.field_name in ("select_rows", "scorer"):
            refuse_without_effect("data", cls, DATA_USED_WITH, value, info)
        return value

    @field_validator("select_rows", "scorer")
    @classmethod
    def _is_needed(cls, value: Any, info: ValidationInfo) -> Any:
        select = info.data.get("select", "all")
        if value is None and select in DATA_USED_WITH[info.field_name]["select"]:
            about = cls.model_fields[info.field_name].description
            fix = f"data.{info.field_name}=...  ({about}), or data.select=all"
            raise broken_rule(f"data.select={select} needs data.{info.field_name}", fix)
        return value

    @pydantic.model_validator(mode="after")
    def _every_source_is_consistent(self) -> DataConfig:
        for number, source in enumerate(self.mixture or []):
            _check_source(f"data.mixture[{number}]", source, self.sources[number])
        return self

    @property
    def sources(self) -> list[Source]:
        """Every data set with all that holds for it; empty where the recipe names none."""
        shared = {
            name: getattr(self, name) for name in Source.model_fields if name in DataConfig.model_fields
        }
        if self.mixture is None:
            return [] if self.path is None else [Source.model_construct(**shared, weight=None)]
        given = [{k: v for k, v in source if v is not None} for source in self.mixture]
        # A template of its own does not go with the section's for rows without an input.
        alone = [{"template_no_input": None} if "template" in own else {} for own in given]
        pairs = zip(alone, given, strict=True)
        return [Source.model_construct(**{**shared, "weight": None, **reset, **own}) for reset, own in pairs]

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The sources' shares of an epoch; None: every row once."""
        weights = [source.weight for source in self.sources]
        return None if None in weights or not weights else tuple(weights)
