"""Which scorings a recipe asks for: the tasks, the baselines beside them, what may have been forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from speft_ds.config.eval_config import EvalConfig

Phase = Literal["before", "after"]


@dataclass(frozen=True)
class EvalJob:
    """One scoring of some tasks.

    Attributes:
        label: names its file.
        kind: `main`; `fewshot`: the base with k examples in the prompt; `format`: the same prompts, written
            another way; `extra`: asked for on a command line.
        num_fewshot: None: each task's own.
        limit: documents a task; None: all.
        format: number of the prompt format; 0: the tasks' own.
        has_text: whether the perplexity of the forgetting text is measured.
    """

    label: str
    kind: Literal["main", "fewshot", "format", "extra"]
    tasks: tuple[str, ...]
    num_fewshot: int | None
    limit: int | None
    format: int = 0
    has_text: bool = False


def jobs_of(recipe: EvalConfig, phase: Phase) -> list[EvalJob]:
    """What is scored before or after training, the recipe's tasks first; nothing where it says so."""
    if not getattr(recipe, phase):
        return []
    tasks, shots, limit = tuple(recipe.tasks), recipe.num_fewshot, recipe.limit
    kept = tuple(task for task in recipe.forgetting_tasks if task not in tasks)
    jobs = []
    if tasks or kept or recipe.forgetting_text:
        has_text = recipe.forgetting_text is not None
        jobs.append(EvalJob(phase, "main", tasks + kept, shots, limit, has_text=has_text))
    if not tasks:
        return jobs
    if phase == "before":
        limits = (limit, recipe.manual_fewshot_limit)
        fewer = min((each for each in limits if each is not None), default=None)
        jobs += [EvalJob(f"before-{k}shot", "fewshot", tasks, k, fewer) for k in recipe.manual_fewshot]
    numbers = range(1, recipe.format_spread)
    return jobs + [EvalJob(f"{phase}-format-{i}", "format", tasks, shots, limit, i) for i in numbers]
