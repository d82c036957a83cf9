"""The `model` and `deepspeed` sections: the frozen base, and how it is sharded."""

from typing import Literal

from speft_ds.config.section import ConfigSection
from speft_ds.config.values import FilePath

HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained completely


class ModelConfig(ConfigSection):
    name_or_path: FilePath
    """a local model folder, or a hub id like owner/name"""
    dtype: Literal["auto", "bfloat16", "float32"] = "bfloat16"
    """the dtype of the base; auto: bfloat16 where the hardware multiplies it, else float32"""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """predict the next token, or a class of the row by a new, densely trained head"""


class DeepSpeedSection(ConfigSection):
    config: FilePath = "zero3_bf16"
    """a name in ds_configs/, or a path to a JSON file"""
