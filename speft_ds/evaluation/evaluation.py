"""Scoring a model on a recipe's tasks, the same whatever the number of ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from lm_eval import simple_evaluate
from torch import nn
from transformers import PreTrainedTokenizerBase

from speft_ds import distributed
from speft_ds.evaluation.answers import Answers
from speft_ds.evaluation.engine_lm import EngineLM
from speft_ds.evaluation.formats import prompt_formats
from speft_ds.evaluation.gathered import model_to_score
from speft_ds.evaluation.perplexity import text_perplexity
from speft_ds.evaluation.rounds import Round
from speft_ds.evaluation.scores import main_scores, score_rows
from speft_ds.evaluation.tasks import find_tasks, local_data
from speft_ds.machine import versions
from speft_ds.metrics import say
from speft_ds.schema import Recipe


@dataclass
class Scored:
    """What a round came to; on rank 0.

    Attributes:
        document: the contents of `eval/<label>.json`.
        samples: task -> its documents, with prompts and answers, as lm-eval logs them.
        results: lm-eval's own.
    """

    document: dict
    samples: dict[str, list[dict]] = field(default_factory=dict)
    results: dict = field(default_factory=dict)


class Evaluation:
    """The tasks of a recipe, found.

    Args:
        recipe: the whole recipe.
        tokenizer: the base's.
    Raises:
        UserError: lm-eval does not know a task.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None):
        self.recipe, self.tokenizer, section = recipe, tokenizer, recipe.eval
        names = [*section.tasks, *section.forgetting_tasks]
        self.manager = find_tasks(names, section.include_path) if names else None
        self.formats = prompt_formats(section.format_spread, recipe.seed)

    def run(self, module: nn.Module, rounds: list[Round], base: dict | None) -> Iterator[Scored | None]:
        """Score rounds one after the other; as `score`, of the engine's module.

        Each is yielded when it is done, so that what was scored is kept if a later one is stopped.
        """
        with model_to_score(module, self.recipe.eval.mode) as (model, is_sharded):
            for round in rounds:
                what = ", ".join(round.tasks) or "the forgetting text"
                say(f"scoring {round.label}: {what}, {'sharded' if is_sharded else 'a copy on every rank'}")
                yield self.score(model, is_sharded, round, base)

    def slice_scores(self, module: nn.Module) -> dict[str, float]:
        """Task and metric -> score on the first `eval.slice` documents a task, on every rank."""
        section = self.recipe.eval
        slice = Round("slice", "main", tuple(section.tasks), section.num_fewshot, section.slice)
        (scored,) = self.run(module, [slice], None)
        scores = None
        if scored is not None:
            scores = {f"{score.task} {score.metric}": score.value for score in main_scores(scored.document)}
        return distributed.broadcast_object(scores)

    def score(self, model: nn.Module, is_sharded: bool, round: Round, base: dict | None) -> Scored | None:
        """One round; every rank enters this together.

        Args:
            model: in eval mode, sharded or a plain copy on every rank.
            base: what identifies the model, if it is the untouched base, whose answers are kept.
        Returns:
            On rank 0; None on the others.
        Raises:
            UserError: a task's data cannot be read.
        """
        start = time.perf_counter()
        answers = Answers({**base, **self._settings_of_answers(is_sharded)}) if base else None
        lm = EngineLM(
            model,
            self.tokenizer,
            self.recipe.eval.batch_size,
            is_sharded,
            self.formats[round.format],
            answers,
        )
        results = self._ask(lm, round) if round.tasks else None
        perplexity = text_perplexity(lm, self.recipe.eval) if round.has_text else None
        if distributed.rank() != 0:
            return None
        rows = score_rows(results, self.recipe.eval.forgetting_tasks) if results else []
        document = {
            "label": round.label,
            "kind": round.kind,
            "model": "base" if base else "tuned",
            "settings": self._settings(round, is_sharded),
            "scores": rows,
            "perplexity": perplexity,
            "seconds": time.perf_counter() - start,
            "cached": bool(answers and answers.all_found),
        }
        return Scored(document, (results or {}).get("samples", {}), results or {})

    def _ask(self, lm: EngineLM, round: Round) -> dict | None:
        seeds = dict.fromkeys(
            ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), self.recipe.seed
        )
        with local_data(self.recipe.eval.data_dir), _quiet():
            return simple_evaluate(
                model=lm,
                tasks=list(round.tasks),
                num_fewshot=round.num_fewshot,
                limit=round.limit,
                apply_chat_template=self.recipe.eval.chat_template,
                task_manager=self.manager,
                **seeds,
            )

    def _settings(self, round: Round, is_sharded: bool) -> dict[str, Any]:
        section = self.recipe.eval
        return {
            "num_fewshot": round.num_fewshot,
            "limit": round.limit,
            "chat_template": section.chat_template,
            "seed": self.recipe.seed,
            "format": round.format,
            "format_text": str(self.formats[round.format]) if round.format else None,
            "mode": "sharded" if is_sharded else "gathered",
            "world_size": distributed.world_size(),
            "batch_size": section.batch_size,
            "lm_eval": version("lm_eval"),
        }

    def _settings_of_answers(self, is_sharded: bool) -> dict[str, Any]:
        return {
            "batch_size": self.recipe.eval.batch_size,
            "seed": self.recipe.seed,
            "device": distributed.device().type,
            "is_sharded": is_sharded,
            "versions": versions(),
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every task whose few-shot setting it follows."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
