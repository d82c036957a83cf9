"""The `method` section: what is trained."""

from typing import Annotated, Literal

from pydantic import Field

from speft_ds.config.section import ConfigSection, Needs
from speft_ds.config.values import Count, PartialShare, Positive, Text

LORA = ("lora", "rslora", "pissa", "dora")  # a low-rank matrix beside each target, by PEFT
SAMPLED = ("lisa", "half")  # other weights every few steps
WITH_MASK = ("sparse", "sparse_lora")


class MethodConfig(ConfigSection):
    name: Literal["sparse", "full", "lisa", "half", "lora", "rslora", "pissa", "dora", "sparse_lora"] = (
        "sparse"
    )
    """a mask's entries; all weights, some layers or half of all at a time; low rank; a mask and low rank"""
    rank: Annotated[Count, Needs("name", LORA)] = 16
    """of the low-rank matrices"""
    alpha: Annotated[Positive, Needs("name", (*LORA, "sparse_lora"))] = 16.0
    """their product is multiplied by alpha / rank; with rslora by alpha / sqrt(rank)"""
    targets: Annotated[list[Text] | None, Field(min_length=1), Needs("name", LORA, even_if_given=True)] = None
    """modules with a low-rank matrix, by name or pattern; null: all linears of the decoder layers"""
    lora_share: Annotated[PartialShare, Needs("name", ("sparse_lora",))] = 0.5
    """the part of the budget (mask.density) that goes into the low-rank matrices"""
    every: Annotated[Count, Needs("name", SAMPLED)] = 20
    """steps until other weights are sampled"""
    layers: Annotated[Count, Needs("name", ("lisa",))] = 2
    """decoder layers that lisa trains at a time, beside all that is in no layer"""

    @property
    def has_mask(self) -> bool:
        return self.name in WITH_MASK

    @property
    def has_lora(self) -> bool:
        return self.name in (*LORA, "sparse_lora")

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained, at some time or other."""
        return self.name in ("full", *SAMPLED)
