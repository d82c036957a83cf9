"""The smaller sections: `model`, `optimizer`, `train`, `deepspeed`, `eval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationInfo, field_validator

from speft_ds.schema.values import (
    Betas,
    Count,
    FilePath,
    Float,
    Interval,
    Section,
    Shots,
    Text,
    broken_rule,
    divisors,
    exactly_one,
    switch_off,
)

HEAD = "score.weight"  # of a classifier: [classes, hidden], new, trained whole


class Model(Section):
    name_or_path: FilePath = Field(description="a local model folder, or a hub id like owner/name")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="the dtype of the base weights")
    task: Literal["causal_lm", "sequence_classification"] = Field(
        "causal_lm",
        description="predict the next token, or a class of the row by a new, densely trained head",
    )


class Optimizer(Section):
    name: Literal["adamw"] = Field("adamw", description="the optimizer of the trained entries")
    lr: Float = Field(1e-3, gt=0, description="the peak learning rate")
    betas: Betas = Field([0.9, 0.999], description="the two decay rates of the moments, each in [0, 1)")
    eps: Float = Field(1e-8, gt=0, description="added to the denominator of the update")
    weight_decay: Float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: Float | None = Field(1.0, gt=0, description="the largest global gradient norm; null: any")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="lr after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")


class Train(Section):
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs")
    epochs: Float | None = Field(1.0, gt=0, validate_default=True, description="passes over the data")
    global_batch: Count = Field(16, description="rows an optimizer step, over all ranks")
    micro_batch: Count = Field(
        4, validate_default=True, description="rows a rank takes in one forward; must divide global_batch"
    )
    activation_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "none", description="recompute activations in the backward: less memory, more time"
    )
    sparse_backend: Literal["auto", "dense", "sampled"] = Field(
        "auto", description="how the sparse weight gradient is computed"
    )
    reduce_bucket: Count = Field(16_777_216, description="entries reduced between ranks in one call")
    checkpoint_every: Interval = Field(
        "15 minutes", description="steps, or minutes as text, between checkpoints; null: only when stopped"
    )
    keep_last: Count = Field(2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(None, description="also keep those of every so many steps")
    keep_best: bool = Field(False, description="also keep that of the lowest loss on eval.held_out")
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


class DeepSpeed(Section):
    config: FilePath = Field("zero3_bf16", description="a name in ds_configs/, or a path to a JSON file")


class Eval(Section):
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
    format_spread: Annotated[int, Field(ge=1, le=50)] = Field(
        1, description="equivalent prompt formats to score the tasks in, their own included (FormatSpread)"
    )
    forgetting_tasks: list[Text] = Field([], description="tasks not trained on, to see what is forgotten")
    forgetting_text: FilePath | None = Field(
        None, description="general text, or rows with `text`: its perplexity before and after"
    )
    forgetting_bytes: Count = Field(100_000, description="of that text, from its beginning")
    held_out: FilePath | None = Field(
        None, description="rows like those of data, to measure the loss on while training"
    )
    every: Count = Field(100, description="steps between measurements while training: held_out, slice")
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
