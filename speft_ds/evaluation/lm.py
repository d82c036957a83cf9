"""lm-eval's Hugging Face model over a ZeRO-3 sharded one, its work dealt over the ranks.

lm-eval itself sees one rank: all ranks build the same requests, so few-shot prompts cannot depend on the
world size. Requests are cut into batches that do not depend on it either; batch b is computed by rank
b modulo world size, and the answers are shared. Where the weights are sharded, every rank takes part in
every forward, as ZeRO-3 demands.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from speft_ds.comm import collectives, watchdog
from speft_ds.evaluation.progress import Progress
from speft_ds.evaluation.prompt_formats import PromptFormat
from speft_ds.evaluation.response_cache import ResponseCache

LOGITS = 2**28  # of a batch, at most (1 GiB in fp32): lm-eval holds those of all positions


class EngineLM(HFLM):
    """The model that lm-eval asks.

    Args:
        model: the engine's module, or a plain copy of it on every rank.
        tokenizer: its tokenizer.
        batch_size: requests a batch.
        is_sharded: whether a forward gathers weights, so that the ranks must keep in step.
        prompt_format: how prompts are rewritten.
        answers: where answers of this very model are kept; None: nowhere.
    Attributes:
        num_rewritten: task -> prompts that the format changed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        is_sharded: bool = True,
        prompt_format: PromptFormat | None = None,
        answers: ResponseCache | None = None,
    ):
        # HFLM warns that a ready-made model is evaluated by one process; dealing its batches is what we do.
        log = logging.getLogger("lm_eval.models.huggingface")
        level = log.level
        log.setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        log.setLevel(level)
        self._device = collectives.device()  # a released ZeRO-3 weight does not tell
        self.is_sharded, self.prompt_format, self.answers = is_sharded, prompt_format, answers
        self.own_batch_size, self.num_rewritten = batch_size, Counter()

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._answer("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        # In one call for all windows: HFLM would hand them over a batch at a time, to one rank.
        self.batch_size_per_gpu = 2**62
        try:
            return self._answer("loglikelihood_rolling", requests, super().loglikelihood_rolling)
        finally:
            self.batch_size_per_gpu = self.own_batch_size

    def generate_until(self, requests, disable_tqdm=False):
        return self._answer("generate_until", requests, self._generate)

    def _answer(self, method: str, requests: list, compute: Callable) -> list:
        """Answers to requests as they are put, rewritten in the format; from the answers kept, if there."""
        if self.prompt_format is not None and method != "loglikelihood_rolling":
            requests = [self._rewritten(request) for request in requests]
        if self.answers is None:
            return compute(requests, disable_tqdm=True)
        return self.answers.get(
            method, [request.args for request in requests], lambda: compute(requests, disable_tqdm=True)
        )

    def _rewritten(self, request: Instance) -> SimpleNamespace:
        arguments = self.prompt_format.rewrite_request(request.args)
        if arguments[0] != request.args[0]:
            self.num_rewritten[request.task_name] += 1
        return SimpleNamespace(args=arguments)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        score = super()._loglikelihood_tokens
        batches = make_batches(
            requests,
            self.own_batch_size,
            order=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            length=lambda request: len(request[1]) + len(request[2]),
            # One forward answers all continuations of one token: lm-eval groups them by this.
            forward=lambda request: (tuple(request[1]), tuple(request[2][:-1])),
            max_tokens=LOGITS // self.vocab_size,
        )
        return self._deal(lambda batch: score(batch, disable_tqdm=True), batches, len(requests))

    def _generate(self, requests, disable_tqdm=False):
        generate = super().generate_until
        by_settings = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        batches = []
        for _, group in groupby(by_settings, key=lambda i: repr(requests[i].args[1])):
            numbers = list(group)
            prompts = [(requests[i], len(self.tok_encode(requests[i].args[0]))) for i in numbers]
            for batch in make_batches(
                prompts, self.own_batch_size, order=lambda each: (-each[1], each[0].args[0])
            ):
                batches.append([(numbers[position], request) for position, (request, _) in batch])
        return self._deal(lambda batch: generate(batch, disable_tqdm=True), batches, len(requests))

    def _model_generate(self, context, max_length, stop, **kwargs):
        # A rank whose sequences are complete keeps running forwards until all are: they gather weights.
        kwargs["synced_gpus"] = self.is_sharded and collectives.world_size() > 1
        return super()._model_generate(context, max_length, stop, **kwargs)

    def _deal(self, compute: Callable[[list], list], batches: list[list], num_requests: int) -> list:
        return shard_batches(compute, batches, num_requests, needs_fillers=self.is_sharded)


def make_batches(
    requests: list,
    batch_size: int,
    order: Callable[[Any], Any],
    length: Callable[[Any], int] = len,
    forward: Callable[[Any], Hashable] | None = None,
    max_tokens: int | None = None,
) -> list[list]:
    """(position, request) pairs in batches, whatever the world size.

    Args:
        batch_size: forwards a batch, at most.
        order: sorts the requests, longest first. As lm-eval's own: in bfloat16, who else is in a batch may
            change an answer.
        length: of a request in tokens, for `max_tokens`.
        forward: requests of one value share a forward, and so a batch; None: none do.
        max_tokens: of a batch padded to its longest; a longer request is a batch of its own.
    """
    shared: dict[Hashable, list] = {}
    for position, request in enumerate(requests):
        shared.setdefault(forward(request) if forward else position, []).append((position, request))
    batches, size, longest = [], batch_size, 0
    for group in sorted(shared.values(), key=lambda group: order(group[0][1])):
        if size == batch_size or (max_tokens and (size + 1) * longest > max_tokens):
            batches.append([])
            size, longest = 0, length(group[0][1]) if max_tokens else 0
        batches[-1] += group
        size += 1
    return batches


def shard_batches(
    compute: Callable[[list], list], batches: list[list], num_requests: int, needs_fillers: bool = True
) -> list:
    """Answers to all requests, on every rank.

    Args:
        compute: a batch's requests -> its answers, in order.
        batches: (position, request) pairs, the same on every rank.
        needs_fillers: a rank without a batch computes one all the same, to keep its forwards in step.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    own, done = [], 0
    with Progress("scoring", num_requests) as progress:
        for first in range(0, len(batches), world_size):
            watchdog.heartbeat(f"evaluation, batch {first + 1} of {len(batches)}")
            collectives.raise_if_stop_requested()
            mine = first + rank < len(batches)
            if mine or needs_fillers:
                batch = batches[first + rank] if mine else batches[0][:1]
                torch.manual_seed(first + rank)  # a task that samples draws by batch, whoever computes it
                answers = compute([request for _, request in batch])
            if mine:
                own += [(position, answer) for (position, _), answer in zip(batch, answers, strict=True)]
            done += sum(map(len, batches[first : first + world_size]))
            progress.update(done)
    results: dict[int, Any] = {}
    for part in collectives.all_gather_objects(own):
        results.update(part)
    if len(results) != num_requests or sum(map(len, batches)) != num_requests:
        raise RuntimeError(f"{len(results)} of {num_requests} requests were answered")
    return [results[position] for position in range(num_requests)]
