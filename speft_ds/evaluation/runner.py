"""Scoring a model on a recipe's tasks, the same whatever the number of ranks."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from torch import nn
from transformers import PreTrainedTokenizerBase

from speft_ds.comm import collectives
from speft_ds.comm.collectives import log_rank0
from speft_ds.config.recipe import Recipe
from speft_ds.env import versions
from speft_ds.evaluation.eval_jobs import EvalJob
from speft_ds.evaluation.gathered import model_to_score
from speft_ds.evaluation.lm import EngineLM
from speft_ds.evaluation.perplexity import text_perplexity
from speft_ds.evaluation.prompt_formats import prompt_formats
from speft_ds.evaluation.response_cache import ResponseCache
from speft_ds.evaluation.results import asked
from speft_ds.evaluation.scores import check_rows, main_scores, score_rows
from speft_ds.evaluation.tasks import find_tasks, local_data


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


class EvalRunner:
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
        self.formats = prompt_formats(section.format_spread)

    def run(self, module: nn.Module, rounds: list[EvalJob], of: dict) -> Iterator[Scored | None]:
        """Score rounds one after the other; as `score`, of the engine's module.

        Each is yielded when it is done, so that what was scored is kept if a later one is stopped.
        """
        with model_to_score(module, self.recipe.eval.mode) as (model, is_sharded):
            for round in rounds:
                what = ", ".join(round.tasks) or "the forgetting text"
                log_rank0(
                    f"scoring {round.label}: {what}, {'sharded' if is_sharded else 'a copy on every rank'}"
                )
                with _random_states_kept():
                    scored = self.score(model, is_sharded, round, of)
                yield scored

    def slice_scores(self, module: nn.Module) -> dict[str, float]:
        """Task and metric -> score on the first `eval.slice` documents a task, on every rank."""
        section = self.recipe.eval
        slice = EvalJob("slice", "main", tuple(section.tasks), section.num_fewshot, section.slice)
        (scored,) = self.run(module, [slice], {})
        scores = None
        if scored is not None:
            scores = {f"{score.task} {score.metric}": score.value for score in main_scores(scored.document)}
        return collectives.broadcast_object(scores)

    def score(self, model: nn.Module, is_sharded: bool, round: EvalJob, of: dict) -> Scored | None:
        """One round; every rank enters this together.

        Args:
            model: in eval mode, sharded or a plain copy on every rank.
            of: what identifies the weights, by `Base.scored_model`; answers of an untouched base are kept.
        Returns:
            On rank 0; None on the others.
        Raises:
            UserError: a task's data cannot be read.
        """
        start = time.perf_counter()
        is_base = "adapter" in of and of["adapter"] is None
        answers = ResponseCache({**of, **self._settings_of_answers(is_sharded)}) if is_base else None
        lm = EngineLM(
            model,
            self.tokenizer,
            self.recipe.eval.batch_size,
            is_sharded,
            self.formats[round.format],
            answers,
        )
        results, notes = self._ask(lm, round) if round.tasks else (None, [])
        perplexity = text_perplexity(lm, self.recipe.eval) if round.has_text else None
        if collectives.rank() != 0:
            return None
        section = self.recipe.eval
        lost = [task for task in section.forgetting_tasks if task not in section.tasks]
        rows = score_rows(results, lost) if results else []
        rows, more = check_rows(rows, round, lm.num_rewritten)
        for note in (notes := [*notes, *more]):
            log_rank0(f"note: {note}")
        document = {
            "label": round.label,
            "kind": round.kind,
            "model": "base" if is_base else "tuned",
            "asked": asked(round, of, self.recipe),
            "settings": self._settings(round, is_sharded),
            "scores": rows,
            "perplexity": perplexity,
            "seconds": time.perf_counter() - start,
            "cached": bool(answers and answers.all_found),
            "notes": notes,
        }
        return Scored(document, self._samples(results, round) if results else {}, results or {})

    def _samples(self, results: dict, round: EvalJob) -> dict[str, list[dict]]:
        """lm-eval's documents, with the prompts as the model got them."""
        if (way := self.formats[round.format]) is not None:
            for row in (row for rows in results["samples"].values() for row in rows):
                row["arguments"] = [way.rewrite_request(arguments) for arguments in row["arguments"]]
        return results["samples"]

    def _ask(self, lm: EngineLM, round: EvalJob) -> tuple[dict | None, list[str]]:
        # lm-eval seeds all generators, with its own defaults, so that stock lm-eval makes the same prompts.
        with local_data(self.recipe.eval.data_dir) as notes, _quiet():
            results = simple_evaluate(
                model=lm,
                tasks=list(round.tasks),
                num_fewshot=round.num_fewshot,
                limit=round.limit,
                apply_chat_template=self.recipe.eval.chat_template,
                task_manager=self.manager,
            )
        return results, sorted(set(notes))

    def _settings(self, round: EvalJob, is_sharded: bool) -> dict[str, Any]:
        section = self.recipe.eval
        return {
            "num_fewshot": round.num_fewshot,
            "limit": round.limit,
            "chat_template": section.chat_template,
            "seed": DEFAULT_OTHER_SEED,
            "format": round.format,
            "format_text": str(self.formats[round.format]) if round.format else None,
            "mode": "sharded" if is_sharded else "gathered",
            "world_size": collectives.world_size(),
            "batch_size": section.batch_size,
            "lm_eval": version("lm_eval"),
        }

    def _settings_of_answers(self, is_sharded: bool) -> dict[str, Any]:
        return {
            "batch_size": self.recipe.eval.batch_size,
            "device": torch.cuda.get_device_name() if collectives.device().type == "cuda" else "cpu",
            "is_sharded": is_sharded,
            "versions": versions(),
        }


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Training draws on as if nothing had been scored in between."""
    python, numpy_state, device = random.getstate(), np.random.get_state(), collectives.device()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


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
