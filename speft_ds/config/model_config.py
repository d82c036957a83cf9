"""The `model` and `deepspeed` sections: the frozen base, and how it is sharded."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from speft_ds.config.section import ConfigSection, Needs, broken_rule
from speft_ds.config.values import BASE_FORMATS, FilePath, Text

HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained completely


class ModelConfig(ConfigSection):
    name_or_path: FilePath
    """a local model folder, or a hub id like owner/name"""
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """the dtype of the base; auto: bfloat16 where the hardware multiplies it, else float32"""
    attention: Text = "auto"
    """eager, sdpa, flash_attention_2, flex_attention or another name of transformers; auto: its choice"""
    base_format: Literal[BASE_FORMATS] | None = None
    """store the frozen linears of the decoder layers in few bits; null: in dtype"""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """predict the next token, or a class of the row by a new, densely trained head"""
    add_tokens: Annotated[
        list[Text] | None, Field(min_length=1), Needs("task", ("causal_lm",), even_if_given=True)
    ] = None
    """new tokens, whose rows of the embedding and of the head are trained beside the mask"""

    @field_validator("attention")
    @classmethod
    def _is_no_download(cls, value: str) -> str:
        if "/" in value:
            message = f"model.attention={value} is a kernel on the hub, whose code is never run here"
            raise broken_rule(message, "model.attention=auto")
        return value

    @field_validator("add_tokens")
    @classmethod
    def _differ(cls, value: list[str] | None) -> list[str] | None:
        if twice := [token for token in value or () if value.count(token) > 1]:
            raise broken_rule(f"{twice[0]!r} is there twice", "name each new token once")
        return value


class DeepSpeedSection(ConfigSection):
    config: FilePath = "zero3_bf16"
    """a name in ds_configs/, or a path to a JSON file"""
    keep_unpartitioned: bool = True
    """a single rank keeps its weights complete; false: they are gathered and freed, as on several ranks"""
