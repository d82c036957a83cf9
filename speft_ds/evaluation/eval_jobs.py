"""The evaluation jobs of a recipe: its tasks, their baselines, and what may have been forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from speft_ds.config.eval_config import EvalConfig

Phase = Literal["before", "after"]


@dataclass(frozen=True)
class EvalJob:
    """Some tasks to score in one way.

    Attributes:
        label: the name of its score file.
        kind: `main`; `fewshot`: the base with k examples in the prompt; `format`: the same prompts in another
            format; `extra`: asked for on the command line.
        num_fewshot: examples in each prompt; None: each task's own number.
        limit: documents per task; None: all.
        format: number of the prompt format; 0: the tasks' own.
        has_text: whether the perplexity of the forgetting text is measured, too.
    """

    label: str
    kind: Literal["main", "fewshot", "format", "extra"]
    tasks: tuple[str, ...]
    num_fewshot: int | None
    limit: int | None
    format: int = 0
    has_text: bool = False


def jobs_of(section: EvalConfig, phase: Phase) -> list[EvalJob]:
    """The jobs before or after training, the recipe's tasks first; none where the recipe skips the phase."""
    if not getattr(section, phase):
        return []
    tasks, shots, limit = tuple(section.tasks), section.num_fewshot, section.limit
    forgetting = tuple(task for task in section.forgetting_tasks if task not in tasks)
    has_text = section.forgetting_text is not None
    jobs = []
    if tasks or forgetting or has_text:
        jobs.append(EvalJob(phase, "main", tasks + forgetting, shots, limit, has_text=has_text))
    if tasks and phase == "before":
        limits = (limit, section.manual_fewshot_limit)
        fewer = min((each for each in limits if each is not None), default=None)
        jobs += [EvalJob(f"before-{k}shot", "fewshot", tasks, k, fewer) for k in section.manual_fewshot]
    if tasks:
        jobs += _other_formats(EvalJob(phase, "format", tasks, shots, limit), section.format_spread)
    return jobs


def extra_jobs(section: EvalConfig, model: str) -> list[EvalJob]:
    """The recipe's tasks in every prompt format, apart from a run; labels begin with `model`, like base."""
    shots = "" if section.num_fewshot is None else f"-{section.num_fewshot}shot"
    limit = f"-limit{section.limit}" if section.limit else ""
    label = f"{model}-{'+'.join(section.tasks)[:150]}{shots}{limit}".replace("/", "_")
    job = EvalJob(label, "extra", tuple(section.tasks), section.num_fewshot, section.limit)
    return [job, *_other_formats(job, section.format_spread)]


def _other_formats(job: EvalJob, format_spread: int) -> list[EvalJob]:
    numbers = range(1, format_spread)
    return [replace(job, label=f"{job.label}-format-{i}", format=i) for i in numbers]
