"""The `model` and `deepspeed` sections: the frozen base, and how it is sharded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speft_ds.config.section import ConfigSection, FilePath

HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained in full


class ModelConfig(ConfigSection):
    name_or_path: FilePath = Field(description="a local model folder, or a hub id like owner/name")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="the dtype of the base weights")
    task: Literal["causal_lm", "sequence_classification"] = Field(
        "causal_lm",
        description="predict the next token, or a class of the row by a new, densely trained head",
    )


class DeepSpeedSection(ConfigSection):
    config: FilePath = Field("zero3_bf16", description="a name in ds_configs/, or a path to a JSON file")
