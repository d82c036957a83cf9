"""lm-eval's results as rows: a task (or group), metric and filter each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from speft_ds.evaluation.eval_jobs import EvalJob
from speft_ds.evaluation.scores import Evaluation as ScoreFile
from speft_ds.evaluation.scores import Score


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
    rows: list[dict], round: EvalJob, num_rewritten: Mapping[str, int]
) -> tuple[list[dict], list[str]]:
    """The rows that are what the round asked for, and what to say of the others.

    Args:
        num_rewritten: task -> prompts that the round's format changed.
    """
    notes, tasks = [], {row["task"]: row for row in rows}
    # lm-eval keeps a number that a task's own file sets to 0.
    fixed = {
        task: row["num_fewshot"]
        for task, row in tasks.items()
        if round.num_fewshot is not None and row["num_fewshot"] not in (None, round.num_fewshot)
    }
    for task, number in fixed.items():
        notes.append(f"{task}: scored with {number} examples, not {round.num_fewshot}: its file says so")
    left_out = set(fixed) if round.kind == "fewshot" else set()
    if round.format:
        grown = {row["group"] for row in rows if num_rewritten.get(row["task"])}
        same = {task for task in tasks if not num_rewritten.get(task) and task not in grown}
        notes += [f"{task}: left out, no `Field:` in its prompts to write otherwise" for task in sorted(same)]
        left_out |= same
    return [row for row in rows if row["task"] not in left_out], notes


def main_scores(document: dict) -> list[Score]:
    """The main score of each task, or of a group of tasks in place of its parts."""
    file = ScoreFile.model_validate(document)
    return file.main_scores("task") + file.main_scores("forgetting")
