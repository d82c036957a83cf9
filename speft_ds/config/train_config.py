"""The `train` section: how long, in what batches, what is kept."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import (
    ConfigSection,
    Count,
    Float,
    Interval,
    broken_rule,
    divisors,
    exactly_one,
    switch_off,
)


class TrainConfig(ConfigSection):
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    epochs: Float | None = Field(1.0, gt=0, validate_default=True, description="passes over the data")
    global_batch: Count = Field(16, description="rows an optimizer step, over all ranks")
    micro_batch: Count = Field(
        4, validate_default=True, description="rows per rank in one forward; must divide global_batch"
    )
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "none", description="recompute activations in the backward: less memory, more time"
    )
    sparse_backend: Literal["auto", "dense", "sampled", "element", "tiled"] = Field(
        "auto", description="how the sparse weight gradient is computed"
    )
    reduce_bucket: Count = Field(4_194_304, description="entries reduced between ranks in one call")
    overlap: bool = Field(True, description="reduce while the backward goes on; false: after it")
    checkpoint_every: Interval = Field(
        "15 minutes", description="steps, or minutes as text, between checkpoints; null: only when stopped"
    )
    keep_last: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(None, description="also keep those of every so many steps")
    keep_best: bool = Field(False, description="also keep that of the lowest loss on eval.validation")
    timeout_minutes: Float = Field(
        30.0, gt=0, description="a rank that makes no progress for so long ends the run, on all ranks"
    )
    monitor: Literal["none", "tensorboard", "wandb", "csv"] = Field(
        "none", description="where metrics go beside metrics.jsonl, by DeepSpeed's monitor"
    )
    max_nonfinite: Count = Field(
        3, description="steps in a row whose loss or gradient may be infinite or NaN; they are skipped"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _steps_switch_epochs_off(cls, data: Any) -> Any:
        return switch_off(data, "epochs", "steps")

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, value: float | None, info: ValidationInfo) -> float | None:
        return exactly_one(value, info, "train", "steps")

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch", value)  # absent where it is itself wrong
        if batch % value:
            message = f"train.micro_batch={value} does not divide train.global_batch={batch}"
            fix = f"train.micro_batch= one of {divisors(batch)}"
            raise broken_rule(message, fix)
        return value
