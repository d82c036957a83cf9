"""lm-eval on the live, sharded engine.

Every rank takes part in every forward, as ZeRO-3 demands. lm-eval itself sees one rank: all ranks build
the same requests, so few-shot prompts cannot depend on the world size. Requests are cut into batches that
do not depend on it either; batch b is computed by rank b modulo world size, and the answers are shared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from speft_ds import distributed, lifeline
from speft_ds.errors import UserError


class EngineLM(HFLM):
    """lm-eval's Hugging Face model over a ZeRO-3 sharded one, its batches dealt over the ranks.

    Args:
        model: the engine's module.
        tokenizer: its tokenizer.
        batch_size: requests a batch.
    """

    def __init__(self, model, tokenizer, batch_size: int):
        # HFLM warns that a ready-made model is evaluated by one process; dealing its batches is what we do.
        log = logging.getLogger("lm_eval.models.huggingface")
        level = log.level
        log.setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        log.setLevel(level)
        self._device = distributed.device()  # a released ZeRO-3 weight does not tell

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        score = super()._loglikelihood_tokens
        return in_lockstep(
            lambda batch: score(batch, disable_tqdm=True),
            make_batches(requests, self.batch_size, lambda request: len(request[1]) + len(request[2])),
            len(requests),
        )

    def generate_until(self, requests, disable_tqdm=False):
        generate = super().generate_until
        by_settings = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        batches = []
        for _, group in groupby(by_settings, key=lambda i: repr(requests[i].args[1])):
            numbers = list(group)
            prompts = [requests[i] for i in numbers]
            for batch in make_batches(prompts, self.batch_size, lambda request: len(request.args[0])):
                batches.append([(numbers[position], request) for position, request in batch])
        return in_lockstep(lambda batch: generate(batch, disable_tqdm=True), batches, len(requests))

    def _model_generate(self, context, max_length, stop, **kwargs):
        # A rank whose sequences are complete keeps running forwards until all are: they gather weights.
        kwargs["synced_gpus"] = distributed.world_size() > 1
        return super()._model_generate(context, max_length, stop, **kwargs)


def make_batches(requests: list, batch_size: int, length: Callable[[Any], int]) -> list[list]:
    """(position, request) pairs in batches of about equal length, longest first, whatever the world size."""
    order = sorted(enumerate(requests), key=lambda pair: -length(pair[1]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_lockstep(compute: Callable[[list], list], batches: list[list], num_requests: int) -> list:
    """Answers to all requests, on every rank; all ranks run the same number of forwards.

    Args:
        compute: a batch's requests -> its answers, in order.
        batches: (position, request) pairs, the same on every rank.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    own = []
    for first in range(0, len(batches), world_size):
        lifeline.beat(f"evaluation, batch {first + 1} of {len(batches)}")
        distributed.stop_if_asked()
        mine = first + rank < len(batches)
        # A filler keeps the forwards of a rank without a batch in step; its answer is dropped.
        batch = batches[first + rank] if mine else batches[0][:1]
        torch.manual_seed(first + rank)  # a task that samples draws by batch, not by who computes it
        answers = compute([request for _, request in batch])
        if mine:
            own += [(position, answer) for (position, _), answer in zip(batch, answers, strict=True)]
    results: dict[int, Any] = {}
    for part in distributed.all_gather_objects(own):
        results.update(part)
    if len(results) != num_requests:
        raise RuntimeError(f"{len(results)} of {num_requests} requests were answered")
    return [results[position] for position in range(num_requests)]


def find_tasks(recipe) -> TaskManager:
    """lm-eval's index of tasks, with those of the recipe in it.

    Args:
        recipe: the `eval` section of a recipe.
    Raises:
        UserError: lm-eval does not know a task.
    """
    if recipe.include_path:  # reading all of lm-eval's own 14,000 files takes seconds, on every rank
        own = TaskManager(include_path=recipe.include_path, include_defaults=False)
        if set(recipe.tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=recipe.include_path)
    unknown = [task for task in recipe.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(unknown)}",
            where="eval.tasks",
            fix="see `lm-eval ls tasks`; tasks of your own need eval.include_path",
        )
    return manager


def evaluate(model, tokenizer, recipe, manager: TaskManager, seed: int) -> dict | None:
    """Score the recipe's tasks; lm-eval's results on rank 0 (lm-eval returns them on local rank 0 alone).

    Args:
        model: the engine's module.
        recipe: the `eval` section of a recipe.
        manager: as `find_tasks` returns it.
    """
    was_training = model.training
    model.eval()
    results = simple_evaluate(
        model=EngineLM(model, tokenizer, recipe.batch_size),
        tasks=list(recipe.tasks),
        num_fewshot=recipe.num_fewshot,
        limit=recipe.limit,
        apply_chat_template=recipe.chat_template,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    model.train(was_training)
    return results


def main_scores(results: dict) -> dict[str, tuple[str, float, float | None]]:
    """Task -> (metric, value, standard error) of the first metric that each task reports."""
    scores = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            if "," in key and "_stderr" not in key and isinstance(value, float | int):
                metric, filter_name = key.split(",")
                error = values.get(f"{metric}_stderr,{filter_name}")
                scores[task] = (metric, float(value), error if isinstance(error, float) else None)
                break
    return scores
