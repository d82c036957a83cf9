"""The `train` section: how long, in what batches, what is kept."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from speft_ds.config.section import ConfigSection, Count, InPlaceOf, Interval, Positive, broken_rule


class TrainConfig(ConfigSection):
    section: ClassVar[str] = "train"

    epochs: Positive | None = 1.0
    """passes over the data"""
    steps: Annotated[Count | None, InPlaceOf("epochs")] = None
    """optimizer steps, in place of epochs"""
    global_batch: Count = 16
    """rows per optimizer step, over all ranks"""
    micro_batch: Count = 4
    """rows that a rank takes in one forward; must divide global_batch"""
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    """recompute activations in the backward: less memory, more time"""
    sparse_backend: Literal["auto", "dense", "sampled", "element", "tiled"] = "auto"
    """how the sparse weight gradient is computed"""
    reduce_bucket: Count = 4_194_304
    """entries reduced between ranks in one call"""
    overlap: bool = True
    """reduce while the backward goes on; false: after it"""
    checkpoint_every: Interval = "15 minutes"
    """steps, or minutes as text, between checkpoints; null: only when stopped"""
    keep_last: Count = 2
    """newest checkpoints that are kept"""
    keep_every: Count | None = None
    """also keep those of every so many steps"""
    keep_best: bool = False
    """also keep that of the lowest loss on eval.validation"""
    timeout_minutes: Positive = 30.0
    """a rank that makes no progress for so long ends the run, on all ranks"""
    monitor: Literal["none", "tensorboard", "wandb", "csv"] = "none"
    """where metrics go beside metrics.jsonl, by DeepSpeed's monitor"""
    max_nonfinite: Count = 3
    """steps in a row whose loss or gradient may be infinite or NaN; they are skipped"""

    @field_validator("micro_batch")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("global_batch", value)  # absent where it is itself wrong
        if batch % value:
            message = f"train.micro_batch={value} does not divide train.global_batch={batch}"
            raise broken_rule(message, f"train.micro_batch= one of {divisors(batch)}")
        return value

    def shared_micro_batch(self, world_size: int) -> int:
        """The micro-batch, or the largest that divides it and that this many ranks can share.

        Where the global batch cannot be shared at all, its own: see `batch_problems`.
        """
        rows, left_over = divmod(self.global_batch, world_size)
        return self.micro_batch if left_over or not rows else math.gcd(self.micro_batch, rows)


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
