"""The `optimizer` and `train` sections: how entries step; how long, in what batches, and what is kept."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from speft_ds.config.section import ConfigSection, InPlaceOf, Needs, broken_rule
from speft_ds.config.values import Count, Decay, Index, Interval, NonNegative, Positive

ADAMW = ("adamw", "adamw_8bit")
Betas = Annotated[list[Decay], Field(min_length=2, max_length=2)]
STASH_FORMATS = ("bfp4", "bfp6", "bfp8")  # from few bits to more, as `dynamic` takes them
LION_BETAS = [0.9, 0.99]  # of its paper; its average is not a second moment


def _only_with(*names: str) -> Needs:
    # Even beside another name: what is left would be another optimizer's.
    return Needs("name", names, even_if_given=True)


class OptimizerConfig(ConfigSection):
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
    """decoupled weight decay: of entries to the pretrained value, of whole weights to 0"""
    clip_norm: Positive | None = 1.0
    """the largest gradient norm; null: any"""
    clip: Literal["global", "per_layer", "per_component"] = "global"
    """what clip_norm bounds: the full gradient, each layer's, each weight's"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """lr after the warm-up"""
    warmup_steps: Index = 0
    """steps of linear warm-up"""

    @model_validator(mode="before")
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


class TrainConfig(ConfigSection):
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
    stash: Literal["bfp8", "bfp4", "dynamic"] | None = None
    """format of the activations kept for the backward; dynamic: few bits, then more; null: their own"""
    sparse_backend: Literal["auto", "dense", "sampled", "element", "tiled", "columns"] = "auto"
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

    profile: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """[first, last] steps whose trace is written, per rank, to the run's profile/; null: none"""

    @field_validator("profile")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            message = f"train.profile is {value}: the first is after the last"
            raise broken_rule(message, f"train.profile=[{value[1]},{value[0]}]")
        return value

    @model_validator(mode="after")
    def _profile_is_inside(self):
        if self.profile is not None and self.steps is not None and self.profile[1] > self.steps:
            message = f"train.profile={self.profile} is not within train.steps={self.steps}"
            inside = f"[{min(self.profile[0], self.steps)},{self.steps}]"
            raise broken_rule(message, f"train.profile={inside}", key="train.profile")
        return self

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
