"""The `eval` section: what is scored, and when."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, ValidationInfo

from speft_ds.config.section import ConfigSection, Count, FilePath, Shots, Text, broken_rule


class EvalConfig(ConfigSection):
    tasks: list[Text] = Field([], description="lm-eval task names; empty: no evaluation")
    include_path: FilePath | None = Field(None, description="a folder of task files of your own")
    data_dir: FilePath | None = Field(
        None, description="local copies of the tasks' data sets, by their hub ids: DIR/openai/gsm8k"
    )
    num_fewshot: Shots | None = Field(None, description="examples in a prompt; null: the task's own")
    limit: Count | None = Field(None, description="documents per task; null: all")
    batch_size: Count = Field(16, description="documents per rank and forward")
    chat_template: bool = Field(True, description="wrap the prompts in the tokenizer's chat template")
    mode: Literal["auto", "gathered", "sharded"] = Field(
        "auto", description="gathered: a full copy on every rank, fast; auto: where it has room"
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
    validation: FilePath | None = Field(
        None, description="rows like those of data, to measure the loss on while training"
    )
    every: Count = Field(100, description="steps between measurements while training: validation, slice")
    slice: Count | None = Field(
        None, description="documents per task to score while training; null: none, until its end"
    )
    before: bool = Field(True, description="score the untouched model")
    after: bool = Field(True, description="score the trained model")

    @pydantic.model_validator(mode="after")
    def _has_tasks(self, info: ValidationInfo) -> EvalConfig:
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
