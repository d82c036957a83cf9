"""The `data` section: which rows, in what format, and how they become sequences."""

from datetime import date
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from speft_ds.config.section import ConfigSection, InPlaceOf, Needs, broken_rule, given_keys, rules_of
from speft_ds.config.values import Count, FilePath, Positive, Text
from speft_ds.errors import UserError

Format = Literal["prompt_completion", "alpaca", "messages", "text", "classification"]
COLUMNS = {  # of each format
    "prompt_completion": ("prompt", "response"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "text": ("text",),
    "classification": ("text", "label"),
}

MAY_BE_NULL = ("subset", "revision", "template", "template_no_input")
OWN_ARGUMENTS = {  # of apply_chat_template, which the rows or tokenising decide
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding",
    "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "strftime_now",
}  # fmt: skip


def template_fields(template: str) -> list[str]:
    """The names of a template's fields, in order of appearance.

    Raises:
        UserError: a brace without its partner, or a field that is more than a name.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template is not readable: {error}", fix="write {{ for a brace") from None
    names = {}
    for _, name, spec, conversion in pieces:
        if name is not None and (not name.isidentifier() or spec or conversion):
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            fix = "a field is the name of a column, like {question}; write {{ for a brace"
            raise UserError(f"the template has a field {{{written}}}", fix=fix)
        names |= {} if name is None else {name: None}
    return list(names)


def _readable_template(value: str) -> str:
    try:
        template_fields(value)
    except UserError as error:
        raise broken_rule(error.what, error.fix) from None
    return value


Template = Annotated[Text, AfterValidator(_readable_template)]


def _readable_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise broken_rule(f"{value!r} is no date", "like 2026-01-31") from None


def _quoted(value: Any) -> Any:
    # YAML 1.1 reads a bare yes, no, on or off as a boolean.
    if isinstance(value, list) and any(isinstance(name, bool | int | float) for name in value):
        words = {True: "yes", False: "no"}
        names = [f'"{words[name] if isinstance(name, bool) else name}"' for name in value]
        what = "data.labels has names that YAML takes for booleans or numbers: they need quotes"
        raise broken_rule(what, f"labels: [{', '.join(names)}] in the recipe, as the rows write them")
    return value


def _format_is(*names: str) -> Needs:
    # Of a mixture, each source may have a format of its own.
    return Needs("format", names, unless="mixture")


class Columns(ConfigSection):
    """Which column of a row holds what; a format uses some of them."""

    instruction: Text = "instruction"
    """format alpaca: what to do"""
    input: Text | None = "input"
    """format alpaca: what to do it with; null: no such column"""
    output: Text = "output"
    """format alpaca: the response"""
    prompt: Text = "prompt"
    """format prompt_completion: the prompt"""
    response: Text = "response"
    """format prompt_completion: the response"""
    messages: Text = "messages"
    """format messages: a conversation, as a list of {role, content}"""
    text: Text = "text"
    """formats text and classification: the text"""
    label: Text = "label"
    """format classification: a class, as a name or a number"""


class Source(ConfigSection):
    """One data set of a mixture; what it leaves out is as the key of the data section says.

    Null is a value of its own where the section's key may be null.
    """

    path: FilePath
    """a file, a folder, or a hub id, as data.path"""
    weight: Positive | None = None
    """its share of an epoch, relative to the others'"""
    subset: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    format: Format | None = None
    columns: Columns | None = None
    template: Template | None = None
    template_no_input: Template | None = None
    chat_template: bool | None = None

    @model_serializer(mode="wrap")
    def _as_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}


class DataConfig(ConfigSection):
    path: FilePath | None = None
    """training rows: .json, .jsonl, .csv, .tsv, .parquet (or .gz, .zst of them), a folder, or a hub id"""
    mixture: Annotated[
        Annotated[list[Source], Field(min_length=1)] | None, InPlaceOf("path", is_needed=False)
    ] = None
    """several data sets in place of path, each {path: ..., weight: ...}"""
    subset: Text | None = None
    """of a data set in a folder or on the hub: its configuration"""
    split: Text = "train"
    """of a data set in a folder or on the hub: its split"""
    revision: Text | None = None
    """of a data set on the hub: branch, tag or commit"""
    format: Format = "prompt_completion"
    """what the columns of a row are"""
    columns: Columns = Columns()
    """the names of the columns"""
    template: Annotated[Template | None, _format_is("prompt_completion", "alpaca", "classification")] = None
    """the prompt as text with named fields, like 'Q: {question}'; null: the format's own"""
    template_no_input: Annotated[Template | None, _format_is("alpaca")] = None
    """format alpaca: the template of rows whose input is empty"""
    chat_template: Annotated[
        bool,
        Needs(
            "format",
            tuple(name for name in COLUMNS if name != "messages"),
            (False,),
            "a conversation is written by the tokenizer's chat template",
        ),
    ] = True
    """wrap prompt and response in the tokenizer's chat template"""
    chat_template_kwargs: dict[str, Any] | None = None
    """options for the chat template, like {enable_thinking: false}"""
    system: str | None = None
    """of conversations without a system prompt, '' for none; null: what the chat template writes by itself"""
    turns: Literal["auto", "each", "last", "together"] = "auto"
    """rows of a conversation: each turn of the assistant, the last, all together; auto: together or each"""
    date: Annotated[str, AfterValidator(_readable_date)] | None = None
    """what chat templates take for today, also in tasks, like 2026-01-31; null: when the run began"""
    labels: Annotated[
        Annotated[list[Text], Field(min_length=2)] | None,
        BeforeValidator(_quoted),
        _format_is("classification"),
    ] = None
    """format classification: the classes in order; null: found in the rows"""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """the most tokens that a row, or a pack of rows, may have"""
    long_rows: Literal["drop", "truncate_prompt", "truncate_response"] = "drop"
    """rows above max_length: left out, cut in the prompt's middle, or at the end"""
    empty_rows: Literal["refuse", "drop"] = "refuse"
    """rows without a prompt or a response: an error, or left out"""
    select: Literal["all", "longest", "random", "ifd"] = "all"
    """which rows: all, the longest responses, random ones, the hardest to follow (IFD)"""
    select_rows: Annotated[Count | None, Needs("select", ("longest", "random", "ifd"), is_needed=True)] = None
    """how many rows select takes"""
    scorer: Annotated[FilePath | None, Needs("select", ("ifd",), is_needed=True)] = None
    """select ifd: a small language model that scores the rows"""
    packing: bool = False
    """several rows in a sequence, each attending to itself alone"""

    @field_validator("mixture")
    @classmethod
    def _all_weights_or_none(cls, value: list[Source] | None) -> list[Source] | None:
        if len({source.weight is None for source in value or ()}) > 1:
            fix = "give every source a weight, or none: then an epoch has every row once"
            raise broken_rule("data.mixture gives a weight to some of its sources only", fix)
        return value

    @field_validator("columns")
    @classmethod
    def _of_the_format(cls, value: Columns, info: ValidationInfo) -> Columns:
        chosen = info.data.get("format")
        if chosen is None or info.data.get("mixture") is not None or "data.format" in given_keys(info):
            return value
        for name, column in value:
            if column != Columns.model_fields[name].default and name not in COLUMNS[chosen]:
                fix = f"its columns are {', '.join(COLUMNS[chosen])}; or set data.format"
                what = f"data.columns.{name} has no effect with data.format={chosen}"
                raise broken_rule(what, fix, key=f"data.columns.{name}")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_options(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if own := sorted((value or {}).keys() & OWN_ARGUMENTS):
            what = f"data.chat_template_kwargs.{own[0]} is not for the recipe to give"
            raise broken_rule(what, "remove it; tools and documents are columns of the rows")
        return value

    @field_validator("template_no_input")
    @classmethod
    def _has_its_partner(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("template", value) is None:
            fix = "give both: data.template for rows with an input, data.template_no_input for the others"
            raise broken_rule("data.template_no_input is given without data.template", fix)
        return value

    @model_validator(mode="after")
    def _every_source_is_consistent(self) -> Self:
        """Refuse what a source of a mixture says without effect, by itself or with what it inherits."""
        for number, own in enumerate(self.mixture or []):
            place, complete = f"data.mixture[{number}]", self.sources[number]
            for key in ("template", "template_no_input", "chat_template"):
                (rule,) = rules_of(DataConfig.model_fields[key])
                value = getattr(complete if key == "chat_template" else own, key)
                if value is not None and rule.concerns(value, None) and complete.format not in rule.values:
                    what = f"{place}.{key}={value} does not go with format {complete.format}: {rule.why}"
                    fix = f"remove it, or format: {' or '.join(rule.values)}"
                    raise broken_rule(what, fix, key=f"{place}.{key}")
            if complete.template_no_input is not None and complete.template is None:
                what = f"{place}.template_no_input is given without a template"
                raise broken_rule(what, "give both", key=f"{place}.template_no_input")
        return self

    @model_validator(mode="after")
    def _has_a_chat_template(self) -> Self:
        """Refuse what a chat template is told where none is used."""
        used = [source.chat_template and source.format != "text" for source in self.sources or [self]]
        for key in ("system", "turns", "chat_template_kwargs"):
            default = DataConfig.model_fields[key].default
            if not any(used) and getattr(self, key) != default:
                why = "data.format=text" if self.format == "text" else "data.chat_template=false"
                fix = f"data.{key}={'null' if default is None else default}"
                raise broken_rule(f"data.{key} has no effect with {why}", fix, key=f"data.{key}")
        return self

    @property
    def sources(self) -> list[Source]:
        """Every data set with all that holds for it; empty where the recipe names none."""
        shared = {key: getattr(self, key) for key in Source.model_fields if key in DataConfig.model_fields}
        if self.mixture is None:
            return [] if self.path is None else [Source.model_construct(**shared, weight=None)]
        found = []
        for source in self.mixture:
            given = {key: getattr(source, key) for key in source.model_fields_set}
            own = {key: value for key, value in given.items() if value is not None or key in MAY_BE_NULL}
            # A template of its own does not go with the section's for rows without an input.
            reset = {"template_no_input": None} if "template" in own else {}
            found.append(Source.model_construct(**{**shared, "weight": None, **reset, **own}))
        return found

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The sources' shares of an epoch; None: every row once."""
        weights = [source.weight for source in self.sources]
        return None if None in weights or not weights else tuple(weights)

    def of_file(self, path: str, labels: list[str] | None = None) -> Self:
        """The section for all rows of another file, to calibrate or validate on; `labels`: of training."""
        changes = {"path": path, "mixture": None, "select": "all", "select_rows": None}
        return self.model_copy(update={**changes, "labels": labels or self.labels})
