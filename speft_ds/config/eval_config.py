"""The `eval` section: what is scored, how and when."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from speft_ds.config.section import ConfigSection, broken_rule, given_keys
from speft_ds.config.values import Count, FilePath, Index, Limit, Text


class AutoPrompt(ConfigSection):
    """A baseline: prompts for the untouched base that are searched on labelled rows."""

    shots: Annotated[int, Field(ge=2)] | None = None
    """labelled rows per task to search a prompt on, none of which is scored; null: no search"""
    examples: Index = 4
    """of these in a prompt, at most"""
    forwards: Count = 2000
    """answers to score per task in the search, at most"""


class EvalConfig(ConfigSection):
    tasks: list[Text] = Field([])
    """lm-eval task names; empty: no evaluation"""
    include_path: FilePath | None = None
    """a folder of task files of your own"""
    data_dir: FilePath | None = None
    """local copies of the tasks' data sets, by their hub ids: DIR/openai/gsm8k"""
    num_fewshot: Index | None = None
    """examples in a prompt; null: the task's own"""
    limit: Limit | None = None
    """documents per task, or a share of them, like 0.1; null: all"""
    batch_size: Count = 16
    """documents that a rank scores at once: their logits, of all positions, are held in fp32"""
    chat_template: bool = True
    """wrap the prompts in the tokenizer's chat template"""
    mode: Literal["auto", "gathered", "sharded"] = "auto"
    """gathered: a complete copy on every rank, fast; auto: where it has room, and there are several ranks"""
    samples: bool = True
    """keep every document's prompt and answer beside the scores"""
    manual_fewshot: list[Index] = Field([])
    """the untouched base with so many examples in its prompts, as baselines"""
    manual_fewshot_limit: Limit | None = None
    """documents per task for baselines of prompts, or a share, where eval.limit is not less; null: as many"""
    auto_prompt: AutoPrompt = AutoPrompt()
    """a prompt searched on labelled rows, as a baseline"""
    format_spread: Annotated[int, Field(ge=1, le=50)] = 1
    """equivalent prompt formats to score the tasks in, their own included (FormatSpread)"""
    forgetting_tasks: list[Text] = Field([])
    """tasks not trained on, to see what is forgotten"""
    forgetting_text: FilePath | None = None
    """general text, or rows with `text`: its perplexity before and after"""
    forgetting_bytes: Count = 100_000
    """of that text, from its beginning"""
    validation: FilePath | None = None
    """rows like those of data, to measure the loss on while training"""
    every: Count = 100
    """steps between measurements while training: validation, slice"""
    slice: Count | None = None
    """documents per task to score while training; null: none, until its end"""
    before: bool = True
    """score the untouched model"""
    after: bool = True
    """score the trained model"""

    @model_validator(mode="after")
    def _has_tasks(self, info: ValidationInfo) -> Self:
        """What is scored on `tasks` needs some, unless they were taken away: eval.tasks=[]."""
        is_forgotten = not self.tasks and "eval.tasks" not in given_keys(info)
        for key in ("manual_fewshot", "auto_prompt", "format_spread", "slice") if is_forgotten else ():
            if getattr(self, key) != EvalConfig.model_fields[key].default:
                message = f"eval.{key} has no effect without eval.tasks"
                raise broken_rule(message, f"eval.tasks=[...], or remove eval.{key}", key=f"eval.{key}")
        return self
