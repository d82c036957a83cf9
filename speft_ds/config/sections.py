"""The smaller sections: `model`, `optimizer`, `train`, `deepspeed`, `eval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import (
    Betas,
    ConfigSection,
    Count,
    FilePath,
    Float,
    Interval,
    Shots,
    Text,
    broken_rule,
    divisors,
    exactly_one,
    refuse_without_effect,
    switch_off,
)

HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained whole


class Model(ConfigSection):
    name_or_path: FilePath = Field(description="a local model folder, or a hub id like owner/name")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "bfloat16",
        description="the dtype of the base; auto: bfloat16 where the hardware multiplies it, else float32",
    )
    task: Literal["causal_lm", "sequence_classification"] = Field(
        "causal_lm",
        description="predict the next token, or a class of the row by a new, densely trained head",
    )


ADAMW = ("adamw", "adamw_8bit", "paged_adamw_8bit")
# key of the optimizer section -> an earlier key, and its values that give it an effect
OPTIMIZER_USED_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "betas": {"name": (*ADAMW, "lion")},
    "eps": {"name": ADAMW},
    "momentum": {"name": ("sgd",)},
}
LION_BETAS = [0.9, 0.99]  # of its paper; its average is not a second moment


class Optimizer(ConfigSection):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "lion"] = Field(
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
        "global", description="what clip_norm bounds: the whole gradient, each layer's, each weight's"
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


class Train(ConfigSection):
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    epochs: Float | None = Field(1.0, gt=0, validate_default=True, description="passes over the data")
    global_batch: Count = Field(16, description="rows an optimizer step, over all ranks")
    micro_batch: Count = Field(
        4, validate_default=True, description="rows a rank takes in one forward; must divide global_batch"
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


class DeepSpeed(ConfigSection):
    config: FilePath = Field("zero3_bf16", description="a name in ds_configs/, or a path to a JSON file")


class Eval(ConfigSection):
    tasks: list[Text] = Field([], description="lm-eval task names; empty: no evaluation")
    include_path: FilePath | None = Field(None, description="a folder of task files of your own")
    data_dir: FilePath | None = Field(
        None, description="local copies of the tasks' data sets, by their hub ids: DIR/openai/gsm8k"
    )
    num_fewshot: Shots | None = Field(None, description="examples in a prompt; null: the task's own")
    limit: Count | None = Field(None, description="documents a task; null: all")
    batch_size: Count = Field(16, description="documents a rank scores at once")
    chat_template: bool = Field(True, description="wrap the prompts in the tokenizer's chat template")
    mode: Literal["auto", "gathered", "sharded"] = Field(
        "auto", description="gathered: a whole copy on every rank, fast; auto: where it has room"
    )
    samples: bool = Field(True, description="keep every document's prompt and answer beside the scores")
    manual_fewshot: list[Shots] = Field(
        [], description="the untouched base with so many examples in its prompts, as baselines"
    )
    manual_fewshot_limit: Count | None = Field(
        None, description="documents a task for these baselines, where eval.limit is not less; null: as many"
    )
    format_spread: Annotated[int, Field(ge=1, le=50)] = Field(
        1, description="equivalent prompt formats to score the tasks in, their own included (FormatSpread)"
    )
    forgetting_tasks: list[Text] = Field([], description="tasks not trained on, to see what is forgotten")
    forgetting_text: FilePath | None = Field(
        None, description="general text, or rows with `text`: its perplexity before and after"
    )
    forgetting_bytes: Count = Field(100_000, description="of that text, from its beginning")
    validation: FilePath | None = Field(
        None, description="rows like those of data, to measure the loss on while training"
    )
    every: Count = Field(100, description="steps between measurements while training: validation, slice")
    slice: Count | None = Field(
        None, description="documents a task to score while training; null: none, until its end"
    )
    before: bool = Field(True, description="score the untouched model")
    after: bool = Field(True, description="score the trained model")

    @pydantic.model_validator(mode="after")
    def _has_tasks(self, info: ValidationInfo) -> Eval:
        """What is scored on `tasks` needs some, unless they were taken away: eval.tasks=[]."""
        needing = {
            "manual_fewshot": bool(self.manual_fewshot),
            "format_spread": self.format_spread > 1,
            "slice": self.slice is not None,
        }
        is_forgotten = not self.tasks and "eval.tasks" not in (info.context or {}).get("given", ())
        if is_forgotten and (idle := [key for key, is_set in needing.items() if is_set]):
            message = f"eval.{idle[0]} has no effect without eval.tasks"
            raise broken_rule(message, f"eval.tasks=[...], or remove eval.{idle[0]}", key=f"eval.{idle[0]}")
        return self
