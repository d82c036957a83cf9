"""The `optimizer` section."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import Betas, ConfigSection, Float, broken_rule, refuse_without_effect

ADAMW = ("adamw", "adamw_8bit")
# key of the optimizer section -> an earlier key, and its values that give it an effect
OPTIMIZER_USED_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "betas": {"name": (*ADAMW, "lion")},
    "eps": {"name": ADAMW},
    "momentum": {"name": ("sgd",)},
}
LION_BETAS = [0.9, 0.99]  # of its paper; its average is not a second moment


class OptimizerConfig(ConfigSection):
    name: Literal["adamw", "adamw_8bit", "sgd", "lion"] = Field(
        "adamw", description="the optimizer of the trained entries; 8bit: moments of one byte"
    )
    lr: Float = Field(1e-3, gt=0, description="the peak learning rate")
    betas: Betas = Field(
        [0.9, 0.999],
        description="the two decay rates of the moments, each in [0, 1); by default, lion's are [0.9, 0.99]",
    )
    eps: Float = Field(1e-8, gt=0, description="added to the denominator of the update")
    momentum: Float = Field(0.0, ge=0, lt=1, description="the decay rate of sgd's heavy ball; 0: none")
    weight_decay: Float = Field(0.0, ge=0, description="decoupled weight decay, to the pretrained value")
    clip_norm: Float | None = Field(1.0, gt=0, description="the largest gradient norm; null: any")
    clip: Literal["global", "per_layer", "per_component"] = Field(
        "global", description="what clip_norm bounds: the global gradient, each layer's, each weight's"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="lr after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _lion_has_betas_of_its_own(cls, data: Any) -> Any:
        is_lion = isinstance(data, dict) and data.get("name") == "lion"
        return {"betas": LION_BETAS, **data} if is_lion else data

    @field_validator(*OPTIMIZER_USED_WITH)
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        # Even beside another name: what is left would be another optimizer's.
        refuse_without_effect("optimizer", cls, OPTIMIZER_USED_WITH, value, info, even_if_given=True)
        return value

    @field_validator("clip")
    @classmethod
    def _clips(cls, value: str, info: ValidationInfo) -> str:
        if value != "global" and info.data.get("clip_norm", 1.0) is None:
            message = f"optimizer.clip={value} has no effect with optimizer.clip_norm=null"
            raise broken_rule(message, "optimizer.clip_norm=1.0, or optimizer.clip=global")
        return value
