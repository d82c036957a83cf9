"""The schema of a recipe: every key, its default, what it means, and the rules between keys.

Closed: an unknown key is refused. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from speft_ds.data.templates import fields_of
from speft_ds.errors import UserError

CACHE = "~/.cache/speft_ds"
HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained whole
MASK_FILE = "mask.safetensors"  # in the folder that `speft score` leaves
# The salience metrics that are computed from rows; the others look at the weights alone.
NEEDS_DATA = frozenset({"gradient", "snip", "force", "taylor_fo", "fisher", "grasp", "grad_low_magnitude"})


def expand_path(path: str) -> str:
    """Expand `~`; `~/.cache` follows XDG_CACHE_HOME where that is set."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and (path == "~/.cache" or path.startswith("~/.cache/")):
        return cache.rstrip("/") + path.removeprefix("~/.cache")
    return os.path.expanduser(path)


def cache_folder(kind: str = "") -> Path:
    """Where things of a kind (`rows`, `ifd`) that were computed once are kept; of any kind."""
    return Path(os.environ.get("SPEFT_DS_CACHE") or expand_path(CACHE)) / kind


def _number(value: Any) -> Any:
    # YAML 1.1, which PyYAML speaks, reads 1e-3 as text: a float there needs a dot and a signed exponent.
    is_exponent = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_exponent else value


def _exactly_one(value: Any, info: ValidationInfo, section: str, other: str) -> Any:
    """Refuse both and neither. Silent where `other` is itself wrong: that is reported already."""
    if other in info.data and (value is None) == (info.data[other] is None):
        both = f"{section}.{info.field_name} and {section}.{other} are both"
        if value is None:
            raise _broken_rule(f"{both} null: one is needed", f"give {section}.{other} a value")
        fix = "keep one; one on the command line sets the other aside"
        raise _broken_rule(f"{both} given, and they exclude each other", fix)
    return value


def _switch_off(data: Any, key: str, other: str) -> Any:
    """A section's raw values, in which giving `other` sets the default of `key` aside."""
    given = isinstance(data, dict) and data.get(other) is not None
    return {key: None, **data} if given else data


def _refuse_without_effect(
    section: str,
    cls: type[BaseModel],
    used_with: dict[str, dict[str, tuple]],
    value: Any,
    info: ValidationInfo,
) -> None:
    """Refuse a value other than the default where no other key gives it an effect."""
    key, default = info.field_name, cls.model_fields[info.field_name].default
    given = (info.context or {}).get("given", ())
    for other, values in used_with[key].items():
        chosen = info.data.get(other, values[0])  # absent where it is itself wrong
        # Where the other key is given, too, it was not forgotten: one line changed, say, in a recipe.
        if value != default and chosen not in values and f"{section}.{other}" not in given:
            message = f"{section}.{key}={value} has no effect with {section}.{other}={chosen}"
            usual = "null" if default is None else default
            fix = f"{section}.{key}={usual}, its default, or {section}.{other}={' or '.join(values)}"
            raise _broken_rule(message, fix)


def _broken_rule(message: str, fix: str, **context: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{message}", {"message": message, "fix": fix, **context})


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(expand_path)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[list[Layer], Field(min_length=2, max_length=2)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


class _Section(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(_Section):
    name_or_path: FilePath = Field(description="a local model folder, or a hub id like owner/name")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="the dtype of the base weights")
    task: Literal["causal_lm", "sequence_classification"] = Field(
        "causal_lm",
        description="predict the next token, or a class of the row by a new, densely trained head",
    )


class Columns(_Section):
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


class Source(_Section):
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
        fields_of(value or "")
    except UserError as error:
        raise _broken_rule(error.what, error.fix) from None
    return value


def _check_source(place: str, own: Source, whole: Source) -> None:
    """Refuse what a source of a mixture says without effect, `whole` being it and what it inherits."""
    for key in ("template", "template_no_input"):
        takes = DATA_USED_WITH[key]["format"]
        if getattr(own, key) is not None and whole.format not in takes:
            message = f"{place}.{key} has no effect with format {whole.format}"
            raise _broken_rule(message, f"remove it, or format: {' or '.join(takes)}", key=f"{place}.{key}")
    if whole.template_no_input is not None and whole.template is None:
        message = f"{place}.template_no_input is given without a template"
        raise _broken_rule(message, "give both", key=f"{place}.template_no_input")
    if whole.format == "messages" and whole.chat_template is False:
        message = f"{place}: format messages is written by the tokenizer's chat template"
        raise _broken_rule(message, "chat_template: true", key=f"{place}.chat_template")


# key of the data section -> an earlier key, and its values that give it an effect
DATA_USED_WITH: dict[str, dict[str, tuple]] = {
    "template": {"format": ("prompt_completion", "alpaca", "classification")},
    "template_no_input": {"format": ("alpaca",)},
    "labels": {"format": ("classification",)},
    "select_rows": {"select": ("longest", "random", "ifd")},
    "scorer": {"select": ("ifd",)},
}


class Data(_Section):
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
            raise _broken_rule("data.path and data.mixture are both given, and they exclude each other", fix)
        if len({source.weight is None for source in value}) > 1:
            fix = "give every source a weight, or none: then an epoch has every row once"
            raise _broken_rule("data.mixture gives a weight to some of its sources only", fix)
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
                raise _broken_rule(what, fix, key=f"data.columns.{name}")
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
            raise _broken_rule("data.template_no_input is given without data.template", fix)
        return value

    @field_validator("chat_template")
    @classmethod
    def _messages_need_it(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("format") == "messages":
            fix = "data.chat_template=true, or data.format=prompt_completion with plain columns"
            raise _broken_rule("data.format=messages is written by the tokenizer's chat template", fix)
        return value

    @field_validator(*DATA_USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("mixture") is None or info.field_name in ("select_rows", "scorer"):
            _refuse_without_effect("data", cls, DATA_USED_WITH, value, info)
        return value

    @field_validator("select_rows", "scorer")
    @classmethod
    def _is_needed(cls, value: Any, info: ValidationInfo) -> Any:
        select = info.data.get("select", "all")
        if value is None and select in DATA_USED_WITH[info.field_name]["select"]:
            about = cls.model_fields[info.field_name].description
            fix = f"data.{info.field_name}=...  ({about}), or data.select=all"
            raise _broken_rule(f"data.select={select} needs data.{info.field_name}", fix)
        return value

    @pydantic.model_validator(mode="after")
    def _every_source_is_consistent(self) -> Data:
        for number, source in enumerate(self.mixture or []):
            _check_source(f"data.mixture[{number}]", source, self.sources[number])
        return self

    @property
    def sources(self) -> list[Source]:
        """Every data set with all that holds for it; empty where the recipe names none."""
        shared = {name: getattr(self, name) for name in Source.model_fields if name in Data.model_fields}
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


# key of the mask section -> keys declared before it, and their values that give it an effect
MASK_USED_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "block_size": {"granularity": ("block",)},
    "lift_rank": {"salience": ("lift",)},
    "update_every": {"schedule": ("periodic", "drop_grow")},
    "drop_rate": {"schedule": ("drop_grow",)},
    "drop_anneal": {"schedule": ("drop_grow",)},
    "growth": {"schedule": ("drop_grow",)},
    "growth_steps": {"schedule": ("drop_grow",), "growth": ("sft_ag",)},
    "topk_fraction": {"schedule": ("grad_topk",)},
    "gate_every": {"layer_gate": ("sampled", "half")},
    "gate_layers": {"layer_gate": ("sampled",)},
}
# key, its values that need an earlier key to be one of these, and why
MASK_GOES_WITH: list[tuple[str, tuple[str, ...], str, tuple[str, ...], str]] = [
    ("budget", ("per_row",), "granularity", ("element",), "a row quota counts single entries"),
    ("schedule", ("drop_grow",), "granularity", ("element",), "it drops and grows single entries"),
    ("schedule", ("drop_grow",), "budget", ("global", "per_layer"), "it would not keep the rows' quotas"),
    (
        "layer_gate",
        ("sampled", "half"),
        "schedule",
        ("static", "periodic", "grad_topk"),
        "entries that the gate keeps still would be dropped for not changing",
    ),
]


class Mask(_Section):
    salience: Literal[
        "gradient",
        "magnitude",
        "low_magnitude",
        "snip",
        "force",
        "taylor_fo",
        "fisher",
        "synflow",
        "grasp",
        "random",
        "lift",
        "grad_low_magnitude",
    ] = Field("gradient", description="how each weight is scored")
    density: Float | None = Field(0.005, gt=0, le=1, description="the fraction of the targets to train")
    num_trainable: Count | None = Field(
        None, validate_default=True, description="how many weights to train, in place of density"
    )
    granularity: Literal["element", "block", "row", "column"] = Field(
        "element", description="what is chosen as one; a unit scores the mean of its entries"
    )
    block_size: int = Field(16, ge=2, description="rows and columns of a block; smaller at a weight's edges")
    budget: Literal["global", "per_layer", "per_row"] = Field(
        "global", description="one threshold for all weights, one for each weight, or for each of its rows"
    )
    targets: list[Text] | None = Field(
        None, min_length=1, description="module names or patterns; null: all linears of the decoder layers"
    )
    layers: Layers | None = Field(
        None, description="[first, last] decoder layers to choose from, both included; null: all"
    )
    lift_rank: Count = Field(128, description="rank of the approximation that lift scores")
    score_device: Literal["device", "host"] = Field(
        "device", description="where the fp32 scores are kept: 4 bytes a targeted weight, over the ranks"
    )
    calibration_samples: Count = Field(64, description="rows that the scores are computed from")
    calibration_batch: Count = Field(
        4, description="rows a calibration micro-batch, fixed so that the mask does not depend on the ranks"
    )
    calibration_seed: Seed | None = Field(None, description="which rows are drawn; null: the recipe's seed")
    calibration_path: FilePath | None = Field(
        None, description="a file of rows to calibrate on; null: the training rows"
    )
    load: FilePath | None = Field(
        None, description="a mask.safetensors of speft score, or its folder, trained as it is; null: score"
    )
    schedule: Literal["static", "periodic", "drop_grow", "grad_topk"] = Field(
        "static", description="whether and how the mask, or what steps inside it, changes during training"
    )
    update_every: Count = Field(100, description="steps between two changes of the mask")
    drop_rate: Float = Field(0.2, gt=0, lt=1, description="the fraction of the entries dropped at the start")
    drop_anneal: Literal["linear", "cosine"] = Field("linear", description="how drop_rate goes to 0")
    growth: Literal["sft_ag", "sft_ma"] = Field(
        "sft_ag", description="grow by accumulated gradients of candidates, or by SM3's momentum estimate"
    )
    growth_steps: Count = Field(
        5, validate_default=True, description="the last steps before a change that sft_ag accumulates over"
    )
    topk_fraction: Float = Field(0.5, gt=0, le=1, description="the fraction of the mask that steps")
    layer_gate: Literal["none", "sampled", "half"] = Field(
        "none", description="train gate_layers random layers, or a random half of the weights, at a time"
    )
    gate_every: Count = Field(20, description="steps until the gate is drawn anew")
    gate_layers: Count = Field(2, description="decoder layers that the sampled gate opens")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _count_switches_density_off(cls, data: Any) -> Any:
        return _switch_off(data, "density", "num_trainable")

    @field_validator("num_trainable")
    @classmethod
    def _one_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _exactly_one(value, info, "mask", "density")

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            message = f"mask.layers is {value}: the first is after the last"
            raise _broken_rule(message, f"mask.layers=[{value[1]},{value[0]}]")
        return value

    @field_validator(*MASK_USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        _refuse_without_effect("mask", cls, MASK_USED_WITH, value, info)
        return value

    @field_validator(*{rule[0] for rule in MASK_GOES_WITH})
    @classmethod
    def _goes_with(cls, value: str, info: ValidationInfo) -> str:
        for key, concerned, other, allowed, why in MASK_GOES_WITH:
            chosen = info.data.get(other, allowed[0])  # absent where it is itself wrong
            if key != info.field_name or value not in concerned or chosen in allowed:
                continue
            free = [v for v in get_args(cls.model_fields[key].annotation) if v not in concerned]
            message = f"mask.{key}={value} does not go with mask.{other}={chosen}: {why}"
            fix = f"mask.{other}={' or '.join(allowed)}, or mask.{key}={' or '.join(free)}"
            raise _broken_rule(message, fix)
        return value

    @field_validator("growth_steps")
    @classmethod
    def _growth_fits(cls, value: int, info: ValidationInfo) -> int:
        is_used = (info.data.get("schedule"), info.data.get("growth")) == ("drop_grow", "sft_ag")
        update_every = info.data.get("update_every", value)  # absent where it is itself wrong
        if is_used and value > update_every:
            message = f"mask.growth_steps={value} is more than mask.update_every={update_every}"
            fix = f"mask.growth_steps={update_every}, or mask.update_every={value} or more"
            raise _broken_rule(message, fix)
        return value

    @property
    def is_scored(self) -> bool:
        """Whether the weights are scored: once for the first mask, or again and again."""
        return self.load is None or self.schedule == "periodic"

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights are scored by a metric that is computed from rows."""
        return self.is_scored and self.salience in NEEDS_DATA


class Optimizer(_Section):
    name: Literal["adamw"] = Field("adamw", description="the optimizer of the trained entries")
    lr: Float = Field(1e-3, gt=0, description="the peak learning rate")
    betas: Betas = Field([0.9, 0.999], description="the two decay rates of the moments, each in [0, 1)")
    eps: Float = Field(1e-8, gt=0, description="added to the denominator of the update")
    weight_decay: Float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: Float | None = Field(1.0, gt=0, description="the largest global gradient norm; null: any")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="lr after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")


class Train(_Section):
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    epochs: Float | None = Field(1.0, gt=0, validate_default=True, description="passes over the data")
    global_batch: Count = Field(16, description="rows an optimizer step, over all ranks")
    micro_batch: Count = Field(
        4, validate_default=True, description="rows a rank takes in one forward; must divide global_batch"
    )
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "none", description="recompute activations in the backward: less memory, more time"
    )
    sparse_backend: Literal["auto", "dense", "sampled"] = Field(
        "auto", description="how the sparse weight gradient is computed"
    )
    reduce_bucket: Count = Field(16_777_216, description="entries reduced between ranks in one call")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _steps_switch_epochs_off(cls, data: Any) -> Any:
        return _switch_off(data, "epochs", "steps")

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _exactly_one(value, info, "train", "steps")

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch", value)  # absent where it is itself wrong
        if batch % value:
            message = f"train.micro_batch={value} does not divide train.global_batch={batch}"
            fix = f"train.micro_batch= one of {divisors(batch)}"
            raise _broken_rule(message, fix)
        return value


class DeepSpeed(_Section):
    config: FilePath = Field("zero3_bf16", description="a name in ds_configs/, or a path to a JSON file")


class Eval(_Section):
    tasks: list[Text] = Field([], description="lm-eval task names; empty: no evaluation")
    include_path: FilePath | None = Field(None, description="a folder of task files of your own")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="null: the task's own")
    limit: Count | None = Field(None, description="documents a task; null: all")
    batch_size: Count = Field(16, description="documents a rank scores at once")
    chat_template: bool = Field(True, description="wrap the prompts in the tokenizer's chat template")
    before: bool = Field(True, description="score the untouched model")
    after: bool = Field(True, description="score the trained model")


class Recipe(_Section):
    """One experiment, checked and with every default filled in."""

    model: Model = Field(description="the frozen base")
    data: Data = Field(Data(), description="the training rows")
    mask: Mask = Field(Mask(), description="which weights are trained")
    optimizer: Optimizer = Field(Optimizer(), description="how they are trained")
    train: Train = Field(Train(), description="how long, and in what batches")
    deepspeed: DeepSpeed = Field(DeepSpeed(), description="how the base is sharded")
    eval: Eval = Field(Eval(), description="what is scored before and after")
    output_dir: FilePath | None = Field(None, description="the run folder; null: runs/<recipe name>")
    seed: Seed = Field(0, description="seeds the order of the rows, calibration, random masks and gates")
    name: str = Field("recipe", description="the file's name; not a key of the YAML")
    _sources: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    @field_validator("train")
    @classmethod
    def _warmup_fits(cls, train: Train, info: ValidationInfo) -> Train:
        warmup = info.data["optimizer"].warmup_steps if "optimizer" in info.data else 0
        if train.steps is not None and warmup > train.steps:
            message = f"optimizer.warmup_steps={warmup} is more than train.steps={train.steps}"
            fix = f"optimizer.warmup_steps={train.steps // 10}, or train.steps={warmup} or more"
            raise _broken_rule(message, fix, key="optimizer.warmup_steps")
        return train

    @field_validator("data")
    @classmethod
    def _fits_the_task(cls, data: Data, info: ValidationInfo) -> Data:
        if "model" not in info.data or info.data["model"].task == "causal_lm":
            return data
        task = "model.task=sequence_classification"
        if other := [source.format for source in data.sources if source.format != "classification"]:
            fix = "data.format=classification, or model.task=causal_lm"
            raise _broken_rule(f"{task} does not go with data.format={other[0]}", fix, key="data.format")
        if data.packing:
            raise _broken_rule(
                f"data.packing does not go with {task}", "data.packing=false", key="data.packing"
            )
        if data.long_rows == "truncate_response":
            fix = "data.long_rows=truncate_prompt, which cuts the text in its middle, or drop"
            message = f"data.long_rows=truncate_response does not go with {task}: there is no response"
            raise _broken_rule(message, fix, key="data.long_rows")
        if data.select in ("longest", "ifd"):
            message = f"data.select={data.select} looks at responses, which {task} has not"
            raise _broken_rule(message, "data.select=random or all", key="data.select")
        return data

    @field_validator("eval")
    @classmethod
    def _has_a_language_model(cls, value: Eval, info: ValidationInfo) -> Eval:
        if value.tasks and "model" in info.data and info.data["model"].task != "causal_lm":
            message = "lm-eval tasks need a language model, and model.task=sequence_classification is none"
            raise _broken_rule(message, "eval.tasks=[]; metrics.jsonl has the accuracy", key="eval.tasks")
        return value

    @field_validator("mask")
    @classmethod
    def _grasp_in_float32(cls, mask: Mask, info: ValidationInfo) -> Mask:
        dtype = info.data["model"].dtype if "model" in info.data else "float32"
        if mask.is_scored and mask.salience == "grasp" and dtype != "float32":
            message = f"mask.salience=grasp needs model.dtype=float32, not {dtype}"
            fix = "model.dtype=float32: it takes a small step along the gradient, which bfloat16 rounds away"
            raise _broken_rule(message, fix, key="mask.salience")
        return mask

    @field_validator("train")
    @classmethod
    def _mask_changes(cls, train: Train, info: ValidationInfo) -> Train:
        mask, steps = info.data.get("mask"), train.steps
        if mask is None or steps is None or mask.schedule not in ("periodic", "drop_grow"):
            return train
        if mask.update_every >= steps:
            message = f"mask.update_every={mask.update_every}, train.steps={steps}: the mask would not change"
            sooner = max(steps // 5, mask.growth_steps if mask.schedule == "drop_grow" else 1)
            ways = [f"mask.update_every={sooner}"] if sooner < steps else []
            ways.append(f"train.steps={mask.update_every + 1} or more")
            raise _broken_rule(message, ", or ".join(ways), key="mask.update_every")
        return train

    def where(self, key: str) -> str:
        """Where the value of a key such as `data.path` was set: file:line, command line, or default."""
        return self._sources.get(key, f"{key} (default)")

    def where_rows(self, number: int = 0) -> str:
        """Where the data set of this number is named."""
        return self.where("data.path" if self.data.mixture is None else f"data.mixture[{number}].path")


def _walk(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel] | None, FieldInfo]]:
    """Every key below a section in order: its name in full, its class where it is a section, its field."""
    for name, field in cls.model_fields.items():
        nested = field.annotation if isinstance(field.annotation, type) else None
        section = nested if nested is not None and issubclass(nested, BaseModel) else None
        yield prefix + name, section, field
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")


SECTIONS = {key: section for key, section, _ in _walk(Recipe) if section is not None}
FIELDS = {key: field for key, section, field in _walk(Recipe) if section is None and key != "name"}
