"""What is kept of a scoring: `eval/<label>.json`, and every document beside it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from lm_eval.utils import handle_non_serializable

from speft_ds.files import replacing, write_json
from speft_ds.report.scores import Evaluation as ScoreFile
from speft_ds.report.scores import Score


def score_rows(results: dict, forgetting: Collection[str] = ()) -> list[dict]:
    """A row a task (or group), metric and filter of lm-eval's results.

    Args:
        forgetting: tasks that are not trained on, scored to see what is lost.
    """
    parent_of = {child: group for group, own in results["group_subtasks"].items() for child in own}
    rows = []
    for task, values in results["results"].items():
        metrics = [key for key in values if "," in key and "_stderr," not in key]
        metrics = [key for key in metrics if isinstance(values[key], float | int)]
        roots = {task, parent_of.get(task), parent_of.get(parent_of.get(task))}
        for number, key in enumerate(metrics):
            metric, filter_name = key.split(",")
            error = values.get(f"{metric}_stderr,{filter_name}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(values[key]),
                    "stderr": float(error) if isinstance(error, float | int) else None,
                    "num_documents": values.get("sample_len") or _num_documents(results, task),
                    "num_fewshot": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                    "higher_is_better": higher is not False,
                    "is_main": number == 0,
                    "is_group": bool(results["group_subtasks"].get(task)),
                    "group": parent_of.get(task),
                    "role": "forgetting" if roots & set(forgetting) else "task",
                }
            )
    return rows


def _num_documents(results: dict, task: str) -> int | None:
    own = results["group_subtasks"].get(task)
    counts = results.get("n-samples", {})
    if own:
        return sum(_num_documents(results, child) or 0 for child in own)
    return counts.get(task, {}).get("effective")


def write_scores(folder: Path, document: dict, samples: dict[str, list[dict]] | None) -> None:
    """Write `<folder>/<label>.json` and, first, each task's documents, `<folder>/<label>/<task>.jsonl`."""
    for task, rows in (samples or {}).items():
        with replacing(folder / document["label"] / f"{task}.jsonl") as temporary:
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(folder / f"{document['label']}.json", document)


def main_scores(document: dict) -> list[Score]:
    """The main score of each task, or of a group of tasks in place of its parts."""
    file = ScoreFile.model_validate(document)
    return file.main_scores("task") + file.main_scores("forgetting")
