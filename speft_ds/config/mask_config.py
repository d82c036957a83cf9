"""The `mask` section: which weights are trained, and when."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import (
    ConfigSection,
    Count,
    FilePath,
    Float,
    Layers,
    Seed,
    Text,
    broken_rule,
    exactly_one,
    refuse_without_effect,
    switch_off,
)

MASK_FILE = "mask.safetensors"  # in the folder that `speft score` leaves
# The salience metrics that are computed from rows; the others look at the weights alone.
NEEDS_DATA = frozenset({"gradient", "snip", "force", "taylor_fo", "fisher", "grasp", "grad_low_magnitude"})

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


class MaskConfig(ConfigSection):
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
        return switch_off(data, "density", "num_trainable")

    @field_validator("num_trainable")
    @classmethod
    def _one_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        return exactly_one(value, info, "mask", "density")

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            message = f"mask.layers is {value}: the first is after the last"
            raise broken_rule(message, f"mask.layers=[{value[1]},{value[0]}]")
        return value

    @field_validator(*MASK_USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_without_effect("mask", cls, MASK_USED_WITH, value, info)
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
            raise broken_rule(message, fix)
        return value

    @field_validator("growth_steps")
    @classmethod
    def _growth_fits(cls, value: int, info: ValidationInfo) -> int:
        is_used = (info.data.get("schedule"), info.data.get("growth")) == ("drop_grow", "sft_ag")
        update_every = info.data.get("update_every", value)  # absent where it is itself wrong
        if is_used and value > update_every:
            message = f"mask.growth_steps={value} is more than mask.update_every={update_every}"
            fix = f"mask.growth_steps={update_every}, or mask.update_every={value} or more"
            raise broken_rule(message, fix)
        return value

    @property
    def is_scored(self) -> bool:
        """Whether the weights are scored: once for the first mask, or again and again."""
        return self.load is None or self.schedule == "periodic"

    @property
    def has_entry_steps(self) -> bool:
        """Whether entries differ in how often they stepped, so that each has its own count."""
        return self.schedule != "static" or self.layer_gate != "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights are scored by a metric that is computed from rows."""
        return self.is_scored and self.salience in NEEDS_DATA
