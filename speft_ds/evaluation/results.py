"""Results of an evaluation: lm-eval's as rows, the files `eval/<label>.json`, and which of them still hold.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import EvalJob, Phase
from speft_ds.evaluation.prompt_formats import prompt_formats
from speft_ds.evaluation.scores import Score, ScoreFile
from speft_ds.io import replacing, write_json

OLD = "old"  # folder of scores that do not hold any more


@dataclass
class Scored:
    """What a job came to; on rank 0.

    Attributes:
        document: the contents of `eval/<label>.json`.
        samples: task -> its documents, with prompts and answers, as lm-eval logs them.
        results: lm-eval's own.
    """

    document: dict
    samples: dict[str, list[dict]] = field(default_factory=dict)
    results: dict = field(default_factory=dict)


def asked(job: EvalJob, of: dict, recipe: Recipe) -> dict[str, Any]:
    """What the scores of a job depend on, beside how the model is run.

    Args:
        of: what identifies the weights.
    """
    section = recipe.eval
    lost = [task for task in section.forgetting_tasks if task in job.tasks]
    return {
        "of": of,
        "tasks": list(job.tasks),
        "forgetting_tasks": lost,
        "num_fewshot": job.num_fewshot,
        "limit": job.limit,
        "chat_template": section.chat_template,
        "format": str(prompt_formats(job.format + 1)[job.format]) if job.format else None,
        "text": [section.forgetting_text, section.forgetting_bytes] if job.has_text else None,
        "sources": [section.include_path, section.data_dir],
    }


def has_scored(folder: Path, job: EvalJob, of: dict, recipe: Recipe) -> bool:
    """Whether `folder` has the scores of a job, of these weights and made as it asks."""
    try:
        document = json.loads((folder / f"{job.label}.json").read_text(encoding="utf-8"))
        return document["asked"] == asked(job, of, recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def still_to_score(
    folder: Path, phase: Phase, wanted: Sequence[EvalJob], of: dict, recipe: Recipe
) -> list[EvalJob]:
    """The jobs of a phase that `folder` has no scores of; its other files of that phase are set aside.

    Nothing that stays is of other weights, other settings, or of a job that is not asked for any more.
    """
    done = [job for job in wanted if has_scored(folder, job, of, recipe)]
    labels = {job.label for job in done}
    for path in sorted(folder.glob(f"{phase}*.json")):
        if path.stem not in labels:
            (folder / OLD).mkdir(exist_ok=True)
            shutil.rmtree(folder / OLD / path.stem, ignore_errors=True)
            if (folder / path.stem).is_dir():
                (folder / path.stem).rename(folder / OLD / path.stem)
            path.replace(folder / OLD / path.name)
    return [job for job in wanted if job not in done]


def keep_scores(folder: Path, scored: Scored, recipe: EvalConfig) -> None:
    """Write `<folder>/<label>.json` and, first, each task's documents, `<folder>/<label>/<task>.jsonl`."""
    from lm_eval.utils import handle_non_serializable  # late: it takes its time

    label = scored.document["label"]
    shutil.rmtree(folder / label, ignore_errors=True)
    for task, rows in scored.samples.items() if recipe.samples else ():
        with replacing(folder / label / f"{task}.jsonl") as temporary:
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(folder / f"{label}.json", scored.document)


def score_rows(results: dict, forgetting: Collection[str] = ()) -> list[dict]:
    """A row a task (or group), metric and filter of lm-eval's results.

    Args:
        forgetting: tasks that are not trained on, scored to see what is lost.
    """
    # Of a group that has no score of its own, the parts stand for themselves.
    named = {child: group for group, own in results["group_subtasks"].items() for child in own}
    parent_of = {child: group for child, group in named.items() if _metrics(results, group)}
    groups = set(parent_of.values())
    rows = []
    for task in results["results"]:
        roots = {task, named.get(task), named.get(named.get(task))}
        for number, (key, value) in enumerate(_metrics(results, task).items()):
            metric, filter_name = key.split(",")
            error = results["results"][task].get(f"{metric}_stderr,{filter_name}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, float | int) else None,
                    "num_documents": _num_documents(results, task),
                    "num_fewshot": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                    "higher_is_better": higher is not False,
                    "is_main": number == 0,
                    "is_group": task in groups,
                    "group": parent_of.get(task),
                    "role": "forgetting" if roots & set(forgetting) else "task",
                }
            )
    return rows


def _metrics(results: dict, task: str) -> dict[str, float]:
    """`metric,filter` -> value."""
    values = results["results"].get(task, {})
    named = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
    return {key: value for key, value in named.items() if isinstance(value, float | int)}


def _num_documents(results: dict, task: str) -> int | None:
    own = results["group_subtasks"].get(task)
    counts = results.get("n-samples", {})
    if own:
        return sum(_num_documents(results, child) or 0 for child in own)
    return counts.get(task, {}).get("effective")


def check_rows(
    rows: list[dict], job: EvalJob, num_rewritten: Mapping[str, int]
) -> tuple[list[dict], list[str]]:
    """The rows that are what the job asked for, and what to say of the others.

    Args:
        num_rewritten: task -> prompts that the job's format changed.
    """
    notes, tasks = [], {row["task"]: row for row in rows}
    # lm-eval keeps a number that a task's own file sets to 0.
    fixed = {
        task: row["num_fewshot"]
        for task, row in tasks.items()
        if job.num_fewshot is not None and row["num_fewshot"] not in (None, job.num_fewshot)
    }
    for task, number in fixed.items():
        notes.append(f"{task}: scored with {number} examples, not {job.num_fewshot}: its file says so")
    left_out = set(fixed) if job.kind == "fewshot" else set()
    if job.format:
        grown = {row["group"] for row in rows if num_rewritten.get(row["task"])}
        same = {task for task in tasks if not num_rewritten.get(task) and task not in grown}
        notes += [f"{task}: left out, no `Field:` in its prompts to write otherwise" for task in sorted(same)]
        left_out |= same
    return [row for row in rows if row["task"] not in left_out], notes


def main_scores(document: dict) -> list[Score]:
    """The main score of each task, or of a group of tasks in place of its parts."""
    file = ScoreFile.model_validate(document)
    return file.main_scores("task") + file.main_scores("forgetting")
