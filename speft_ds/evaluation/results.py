"""The score files of a run, `eval/<label>.json`: what they are of, which still hold, writing them.

Imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import EvalJob, Phase
from speft_ds.evaluation.prompt_formats import prompt_formats
from speft_ds.io import replacing, write_json

if TYPE_CHECKING:
    from speft_ds.evaluation.results import Scored

OLD = "old"  # folder of scores that do not hold any more


def asked(round: EvalJob, of: dict, recipe: Recipe) -> dict[str, Any]:
    """What the scores of a round depend on, beside how the model is run.

    Args:
        of: what identifies the weights.
    """
    section = recipe.eval
    lost = [task for task in section.forgetting_tasks if task in round.tasks]
    return {
        "of": of,
        "tasks": list(round.tasks),
        "forgetting_tasks": lost,
        "num_fewshot": round.num_fewshot,
        "limit": round.limit,
        "chat_template": section.chat_template,
        "format": str(prompt_formats(round.format + 1)[round.format]) if round.format else None,
        "text": [section.forgetting_text, section.forgetting_bytes] if round.has_text else None,
        "sources": [section.include_path, section.data_dir],
    }


def has_scored(folder: Path, round: EvalJob, of: dict, recipe: Recipe) -> bool:
    """Whether `folder` has the scores of a round, of these weights and made as it asks."""
    try:
        document = json.loads((folder / f"{round.label}.json").read_text(encoding="utf-8"))
        return document["asked"] == asked(round, of, recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def still_to_score(
    folder: Path, moment: Phase, wanted: Sequence[EvalJob], of: dict, recipe: Recipe
) -> list[EvalJob]:
    """The rounds of a moment that `folder` has no scores of; its other files of that moment are set aside.

    Nothing that stays is of other weights, other settings, or of a round that is not asked for any more.
    """
    done = [round for round in wanted if has_scored(folder, round, of, recipe)]
    labels = {round.label for round in done}
    for path in sorted(folder.glob(f"{moment}*.json")):
        if path.stem not in labels:
            (folder / OLD).mkdir(exist_ok=True)
            shutil.rmtree(folder / OLD / path.stem, ignore_errors=True)
            if (folder / path.stem).is_dir():
                (folder / path.stem).rename(folder / OLD / path.stem)
            path.replace(folder / OLD / path.name)
    return [round for round in wanted if round not in done]


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
