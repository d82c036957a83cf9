"""The `optimizer` section: how the trained entries step."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import ConfigSection, Decay, Index, Needs, NonNegative, Positive, broken_rule

ADAMW = ("adamw", "adamw_8bit")
Betas = Annotated[list[Decay], Field(min_length=2, max_length=2)]
LION_BETAS = [0.9, 0.99]  # of its paper; its average is not a second moment


def _only_with(*names: str) -> Needs:
    # Even beside another name: what is left would be another optimizer's.
    return Needs("name", names, even_if_given=True)


class OptimizerConfig(ConfigSection):
    section: ClassVar[str] = "optimizer"

    name: Literal["adamw", "adamw_8bit", "sgd", "lion"] = "adamw"
    """the optimizer of the trained entries; 8bit: moments of one byte"""
    lr: Positive = 1e-3
    """the peak learning rate"""
    betas: Annotated[Betas, _only_with(*ADAMW, "lion")] = Field([0.9, 0.999])
    """the two decay rates of the moments, each in [0, 1); by default, lion's are [0.9, 0.99]"""
    eps: Annotated[Positive, _only_with(*ADAMW)] = 1e-8
    """added to the denominator of the update"""
    momentum: Annotated[Decay, _only_with("sgd")] = 0.0
    """the decay rate of sgd's heavy ball; 0: none"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay, to the pretrained value"""
    clip_norm: Positive | None = 1.0
    """the largest gradient norm; null: any"""
    clip: Literal["global", "per_layer", "per_component"] = "global"
    """what clip_norm bounds: the full gradient, each layer's, each weight's"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """lr after the warm-up"""
    warmup_steps: Index = 0
    """steps of linear warm-up"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _lion_has_betas_of_its_own(cls, values: Any) -> Any:
        is_lion = isinstance(values, dict) and values.get("name") == "lion"
        return {"betas": LION_BETAS, **values} if is_lion else values

    @field_validator("clip")
    @classmethod
    def _clips(cls, value: str, info: ValidationInfo) -> str:
        if value != "global" and info.data.get("clip_norm", 1.0) is None:
            message = f"optimizer.clip={value} has no effect with optimizer.clip_norm=null"
            raise broken_rule(message, "optimizer.clip_norm=1.0, or optimizer.clip=global")
        return value
