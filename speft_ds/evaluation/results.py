"""Results of evaluation jobs: lm-eval's as scores, the files `eval/<label>.json`, which of them still hold.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import EvalJob, Phase, prompt_formats
from speft_ds.evaluation.scores import Score, ScoreFile
from speft_ds.io import read_json, replacing, write_json
from speft_ds.untrusted import path_within

BY_LENGTH = ("acc_norm", "acc_bytes")
OLD = "old"  # folder of scores that no longer hold


@dataclass
class Scored:
    """The results of a job, on rank 0."""

    file: ScoreFile  # the contents of `eval/<label>.json`
    results: dict  # lm-eval's own; of these `samples`: task -> its documents, with prompts and responses


def asked(job: EvalJob, of: dict, recipe: Recipe) -> dict[str, Any]:
    """What the scores of a job depend on, apart from how the model is run; `of` identifies the weights."""
    section = recipe.eval
    return {
        "of": of,
        "tasks": list(job.tasks),
        "forgetting_tasks": [task for task in section.forgetting_tasks if task in job.tasks],
        "num_fewshot": job.num_fewshot,
        "limit": job.limit,
        "chat_template": section.chat_template,
        **({"date": recipe.data.date} if section.chat_template and recipe.data.date else {}),
        **({"auto_prompt": [section.auto_prompt.model_dump(), recipe.seed]} if job.kind == "auto" else {}),
        "format": str(prompt_formats(job.format + 1)[job.format]) if job.format else None,
        "text": [section.forgetting_text, section.forgetting_bytes] if job.has_text else None,
        "sources": [section.include_path, section.data_dir],
    }


def has_scored(folder: Path, job: EvalJob, of: dict, recipe: Recipe) -> bool:
    """Whether `folder` has the scores of this job, of these weights."""
    try:
        return read_json(folder / f"{job.label}.json")["asked"] == asked(job, of, recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def still_to_score(
    folder: Path, phase: Phase, wanted: Sequence[EvalJob], of: dict, recipe: Recipe
) -> list[EvalJob]:
    """The jobs of a phase that `folder` has no scores of.

    All other score files of the phase move to `old`: they are of other weights, of other settings, or of a
    job that the recipe no longer asks for.
    """
    done = [job for job in wanted if has_scored(folder, job, of, recipe)]
    labels = {job.label for job in done}
    for path in sorted([*folder.glob(f"{phase}.json"), *folder.glob(f"{phase}-*.json")]):
        if path.stem not in labels:
            (folder / OLD).mkdir(exist_ok=True)
            shutil.rmtree(folder / OLD / path.stem, ignore_errors=True)
            for each in (path.with_suffix(""), path):
                if each.exists():
                    each.replace(folder / OLD / each.name)
    return [job for job in wanted if job not in done]


def keep_scores(folder: Path, scored: Scored, section: EvalConfig) -> None:
    """Write each task's documents, `<folder>/<label>/<task>.jsonl`, and then `<folder>/<label>.json`."""
    from lm_eval.utils import handle_non_serializable  # late: it takes its time

    documents = folder / scored.file.label
    shutil.rmtree(documents, ignore_errors=True)
    samples = scored.results.get("samples", {}) if section.samples else {}
    for task, rows in samples.items():
        with replacing(path_within(documents, f"{task}.jsonl")) as temporary:
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(folder / f"{scored.file.label}.json", scored.file.model_dump())


def scores_of(results: dict, forgetting: Collection[str] = ()) -> list[Score]:
    """lm-eval's results: a score per task (or group), metric and filter; `forgetting` are of that role."""
    children = results["group_subtasks"]
    parent_of = {child: group for group, tasks in children.items() for child in tasks}
    scores = []
    for task, values in results["results"].items():
        group = parent_of.get(task)
        is_forgetting = not {task, group, parent_of.get(group)}.isdisjoint(forgetting)
        higher_is_better = results["higher_is_better"].get(task, {})
        for number, (key, value) in enumerate(_metrics(results, task).items()):
            metric, filter_name = key.split(",")
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, float | int) else None,
                    num_documents=_num_documents(results, task),
                    num_fewshot=results["n-shot"].get(task),
                    version=results["versions"].get(task),
                    higher_is_better=higher_is_better.get(metric) is not False,
                    is_main=number == 0,
                    role="forgetting" if is_forgetting else "task",
                    is_group=bool(children.get(task)),
                    # The parts of a group that has no score of its own stand for themselves.
                    group=group if _metrics(results, group) else None,
                )
            )
    return scores


def _metrics(results: dict, task: str | None) -> dict[str, float]:
    """`metric,filter` -> value."""
    values = results["results"].get(task, {}).items()
    named = {key: value for key, value in values if "," in key and "_stderr," not in key}
    return {key: value for key, value in named.items() if isinstance(value, float | int)}


def _num_documents(results: dict, task: str) -> int | None:
    if children := results["group_subtasks"].get(task):
        return sum(_num_documents(results, child) or 0 for child in children)
    return results["n-samples"].get(task, {}).get("effective")


def check_scores(
    scores: list[Score], job: EvalJob, num_rewritten: Mapping[str, int]
) -> tuple[list[Score], list[str]]:
    """The scores that the job asked for, and notes on those that lm-eval made otherwise.

    Args:
        num_rewritten: task -> prompts that the job's format changed.
    """
    shots, made = job.num_fewshot, {score.task: score.num_fewshot for score in scores}
    # Where a task's own file sets the number of examples to 0, lm-eval keeps it.
    fixed = [task for task, number in made.items() if shots is not None and number not in (None, shots)]
    notes = [f"{task}: scored with {made[task]} examples, not {shots}: its file says so" for task in fixed]
    left_out = set(fixed) if job.kind == "fewshot" else set()
    if job.kind == "auto":  # lm-eval divides by the length of the task's own choices
        scores = [score for score in scores if score.metric not in BY_LENGTH]
    if job.format:
        changed = {name for s in scores if num_rewritten.get(s.task) for name in (s.task, s.group)}
        unchanged = {score.task for score in scores} - changed
        notes += [f"{task}: left out, no `Field:` in its prompts to rewrite" for task in sorted(unchanged)]
        left_out |= unchanged
    return [score for score in scores if score.task not in left_out], notes
