"""A recipe: its sections, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator

import pydantic
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from speft_ds.config.data_config import DataConfig
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.model_config import DeepSpeedSection, ModelConfig
from speft_ds.config.optimizer_config import OptimizerConfig
from speft_ds.config.section import ConfigSection, FilePath, Seed, broken_rule
from speft_ds.config.train_config import TrainConfig


class Recipe(ConfigSection):
    """One experiment, checked and with every default filled in."""

    model: ModelConfig = Field(description="the frozen base")
    data: DataConfig = Field(DataConfig(), description="the training rows")
    mask: MaskConfig = Field(MaskConfig(), description="which weights are trained")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how they are trained")
    train: TrainConfig = Field(TrainConfig(), description="how long, and in what batches")
    deepspeed: DeepSpeedSection = Field(DeepSpeedSection(), description="how the base is sharded")
    eval: EvalConfig = Field(EvalConfig(), description="what is scored before and after")
    output_dir: FilePath | None = Field(None, description="the run folder; null: runs/<recipe name>")
    seed: Seed = Field(0, description="seeds the order of the rows, calibration, random masks and gates")
    name: str = Field("recipe", description="the file's name; not a key of the YAML")
    _sources: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    @field_validator("train")
    @classmethod
    def _warmup_fits(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        warmup = info.data["optimizer"].warmup_steps if "optimizer" in info.data else 0
        if train.steps is not None and warmup > train.steps:
            message = f"optimizer.warmup_steps={warmup} is more than train.steps={train.steps}"
            fix = f"optimizer.warmup_steps={train.steps // 10}, or train.steps={warmup} or more"
            raise broken_rule(message, fix, key="optimizer.warmup_steps")
        return train

    @field_validator("data")
    @classmethod
    def _fits_the_task(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        if "model" not in info.data or info.data["model"].task == "causal_lm":
            return data
        task = "model.task=sequence_classification"
        if other := [source.format for source in data.sources if source.format != "classification"]:
            fix = "data.format=classification, or model.task=causal_lm"
            raise broken_rule(f"{task} does not go with data.format={other[0]}", fix, key="data.format")
        if data.packing:
            raise broken_rule(
                f"data.packing does not go with {task}", "data.packing=false", key="data.packing"
            )
        if data.long_rows == "truncate_response":
            fix = "data.long_rows=truncate_prompt, which cuts the text in its middle, or drop"
            message = f"data.long_rows=truncate_response does not go with {task}: there is no response"
            raise broken_rule(message, fix, key="data.long_rows")
        if data.select in ("longest", "ifd"):
            message = f"data.select={data.select} looks at responses, which {task} has not"
            raise broken_rule(message, "data.select=random or all", key="data.select")
        return data

    @field_validator("eval")
    @classmethod
    def _has_a_language_model(cls, value: EvalConfig, info: ValidationInfo) -> EvalConfig:
        if value.tasks and "model" in info.data and info.data["model"].task != "causal_lm":
            message = "lm-eval tasks need a language model, and model.task=sequence_classification is none"
            raise broken_rule(message, "eval.tasks=[]; metrics.jsonl has the accuracy", key="eval.tasks")
        return value

    @field_validator("eval")
    @classmethod
    def _best_is_measured(cls, value: EvalConfig, info: ValidationInfo) -> EvalConfig:
        if "train" in info.data and info.data["train"].keep_best and value.validation is None:
            message = "train.keep_best needs a validation loss to go by"
            fix = "eval.validation=rows.jsonl, or train.keep_best=false"
            raise broken_rule(message, fix, key="train.keep_best")
        return value

    @field_validator("mask")
    @classmethod
    def _grasp_in_float32(cls, mask: MaskConfig, info: ValidationInfo) -> MaskConfig:
        dtype = info.data["model"].dtype if "model" in info.data else "float32"
        if mask.is_scored and mask.salience == "grasp" and dtype != "float32":
            message = f"mask.salience=grasp needs model.dtype=float32, not {dtype}"
            fix = "model.dtype=float32: it takes a small step along the gradient, which bfloat16 rounds away"
            raise broken_rule(message, fix, key="mask.salience")
        return mask

    @field_validator("train")
    @classmethod
    def _mask_changes(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        mask, steps = info.data.get("mask"), train.steps
        if mask is None or steps is None or mask.schedule not in ("periodic", "drop_grow"):
            return train
        if mask.update_every >= steps:
            message = f"mask.update_every={mask.update_every}, train.steps={steps}: the mask would not change"
            sooner = max(steps // 5, mask.growth_steps if mask.schedule == "drop_grow" else 1)
            ways = [f"mask.update_every={sooner}"] if sooner < steps else []
            ways.append(f"train.steps={mask.update_every + 1} or more")
            raise broken_rule(message, ", or ".join(ways), key="mask.update_every")
        return train

    @property
    def walks_all_layers(self) -> bool:
        """Whether a backward goes down to the embedding, not just to the lowest layer that is trained.

        It must where that is another layer every step, or where inputs need a gradient (re-entrant
        activation checkpointing).
        """
        return self.train.activation_checkpointing == "reentrant" or self.mask.layer_gate != "none"

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
