"""lm-eval's Hugging Face model over a ZeRO-3 sharded one, with its batches spread over the ranks.

lm-eval itself sees one rank: all ranks build the same requests, so few-shot prompts do not depend on the
world size. Neither do the batches that the requests are cut into; rank b modulo world size computes batch b,
and all ranks get all responses. Where the weights are sharded, every rank takes part in every forward, as
ZeRO-3 demands.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from speft_ds.comm import collectives, watchdog
from speft_ds.env import cache_folder, log_rank0
from speft_ds.evaluation.eval_jobs import PromptFormat
from speft_ds.io import write_json

MAX_LOGITS = 2**28  # per batch (1 GiB in fp32): lm-eval keeps the logits of all positions
LOG_EVERY_S = 30.0  # the progress, where there is no terminal to show a bar on
LOG_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, about {remaining} left"


class EngineLM(HFLM):
    """The model that lm-eval scores.

    Args:
        model: the engine's module, or a plain copy of it on every rank.
        is_sharded: whether a forward gathers weights, so that the ranks must run the same number of them.
        prompt_format: rewrites the prompts; None: they stay as they are.
        cache: of responses by this model; None: every response is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        is_sharded: bool,
        prompt_format: PromptFormat | None,
        cache: ResponseCache | None,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._device = collectives.device()  # HFLM reads it off a weight, and a partitioned one is elsewhere
        self.is_sharded, self.prompt_format, self.cache = is_sharded, prompt_format, cache
        self.own_batch_size = batch_size
        self.num_rewritten: Counter[str] = Counter()  # task -> prompts that the format changed

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._respond("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        self.batch_size_per_gpu = 2**62  # all windows in one call: HFLM would pass them on batch by batch
        try:
            return self._respond("loglikelihood_rolling", requests, super().loglikelihood_rolling)
        finally:
            self.batch_size_per_gpu = self.own_batch_size

    def generate_until(self, requests, disable_tqdm=False):
        return self._respond("generate_until", requests, self._generate)

    def _respond(self, method: str, requests: list, compute: Callable) -> list:
        if self.prompt_format is not None and method != "loglikelihood_rolling":
            requests = [self._rewrite(request) for request in requests]
        arguments = [request.args for request in requests]
        return self.cached(method, arguments, lambda: compute(requests, disable_tqdm=True))

    def _rewrite(self, request: Instance) -> SimpleNamespace:
        arguments = self.prompt_format.rewrite_request(request.args)
        self.num_rewritten[request.task_name] += arguments[0] != request.args[0]
        return SimpleNamespace(args=arguments)

    def cached(self, method: str, requests: list[tuple], compute: Callable[[], list]) -> list:
        """The responses from the cache, if there is one, or else computed."""
        return compute() if self.cache is None else self.cache.get(method, requests, compute)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        score = super()._loglikelihood_tokens
        batches = make_batches(
            requests,
            self.own_batch_size,
            order=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            length=lambda request: len(request[1]) + len(request[2]),
            # One forward scores all continuations of one token: lm-eval groups them by this.
            forward=lambda request: (tuple(request[1]), tuple(request[2][:-1])),
            max_tokens=MAX_LOGITS // self.vocab_size,
        )
        return shard_batches(lambda batch: score(batch, disable_tqdm=True), batches, self.is_sharded)

    def _generate(self, requests, disable_tqdm=False):
        generate = super().generate_until
        batches = make_batches(
            requests,
            self.own_batch_size,
            order=lambda request: (-len(self.tok_encode(request.args[0])), request.args[0]),
            settings=lambda request: repr(request.args[1]),
        )
        return shard_batches(lambda batch: generate(batch, disable_tqdm=True), batches, self.is_sharded)

    def _model_generate(self, context, max_length, stop, **kwargs):
        # A rank whose sequences are complete keeps running forwards until all are: they gather weights.
        kwargs["synced_gpus"] = self.is_sharded and collectives.world_size() > 1
        return super()._model_generate(context, max_length, stop, **kwargs)


def make_batches(
    requests: list,
    batch_size: int,
    order: Callable[[Any], Any],
    length: Callable[[Any], int] = lambda _: 0,
    forward: Callable[[Any], Hashable] | None = None,
    settings: Callable[[Any], str] = lambda _: "",
    max_tokens: float = math.inf,
) -> list[list]:
    """(position, request) pairs in batches, the same for every world size.

    Args:
        batch_size: forwards per batch, at most.
        order: sort key of a request, longest first. It is lm-eval's own: in bfloat16, the other rows of a
            batch may change a response.
        length: of a request in tokens, for `max_tokens`.
        forward: requests of equal value share a forward, and so a batch; None: none do.
        settings: requests of different values are in different batches.
        max_tokens: of a batch padded to its longest request; a longer request is a batch of its own.
    """
    shared: dict[Hashable, list] = {}
    for position, request in enumerate(requests):
        shared.setdefault(forward(request) if forward else position, []).append((position, request))
    batches, size, longest, last = [], batch_size, 0, ""
    for group in sorted(shared.values(), key=lambda group: (settings(group[0][1]), order(group[0][1]))):
        request = group[0][1]
        if size == batch_size or (size + 1) * longest > max_tokens or settings(request) != last:
            batches.append([])
            size, longest, last = 0, length(request), settings(request)
        batches[-1] += group
        size += 1
    return batches


def shard_batches(compute: Callable[[list], list], batches: list[list], needs_fillers: bool) -> list:
    """The responses to all requests in order, on every rank; each rank computes its share of the batches.

    Args:
        compute: requests of a batch -> their responses, in order.
        batches: (position, request) pairs, the same on every rank; together, every position once.
        needs_fillers: a rank without a batch computes one all the same, since its forwards gather weights.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    own, done, total, start = [], 0, sum(map(len, batches)), time.monotonic()
    logged = start
    with tqdm(total=total, desc="scoring", leave=False, disable=None if rank == 0 else True) as bar:
        for first in range(0, len(batches), world_size):
            watchdog.heartbeat(f"evaluation, batch {first + 1} of {len(batches)}")
            collectives.raise_if_stop_requested()
            has_batch = first + rank < len(batches)
            if has_batch or needs_fillers:
                batch = batches[first + rank] if has_batch else batches[0][:1]
                torch.manual_seed(first + rank)  # sampling depends on the batch, not on who computes it
                responses = compute([request for _, request in batch])
            if has_batch:
                own += [(position, each) for (position, _), each in zip(batch, responses, strict=True)]
            size = sum(map(len, batches[first : first + world_size]))
            done, now = done + size, time.monotonic()
            bar.update(size)
            if bar.disable and now - logged > LOG_EVERY_S:
                logged = now
                line = {"prefix": "scoring", "unit": "", "bar_format": LOG_LINE}
                log_rank0(tqdm.format_meter(done, total, now - start, **line))
    all_responses = dict(pair for part in collectives.all_gather_objects(own) for pair in part)
    assert sorted(all_responses) == list(range(total))
    return [all_responses[position] for position in range(total)]


class ResponseCache:
    """The untouched base's responses, kept for later runs on the same base.

    They are in files named by a hash of all that they depend on: the requests, with the prompts, few-shot
    examples and documents in them, and the settings.

    Args:
        settings: of the model and how it is run: fingerprint, dtype, batch size, device, versions.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = json.dumps(settings, sort_keys=True)
        self.num_calls = self.num_hits = 0  # of `get`, and those that a file answered

    def path(self, method: str, requests: list[tuple]) -> Path:
        """The file for the responses to these requests."""
        digest = hashlib.sha256(f"{self.settings}\n{method}\n".encode())
        for request in requests:
            digest.update(json.dumps(request, sort_keys=True, default=repr).encode() + b"\n")
        return cache_folder("answers") / f"{digest.hexdigest()}.json"

    def get(self, method: str, requests: list[tuple], compute: Callable[[], list]) -> list:
        """The responses, read from the file or computed and written; every rank calls this together."""
        path = self.path(method, requests)
        cached = read_responses(path, len(requests)) if collectives.rank() == 0 else None
        cached = collectives.broadcast_object(cached)
        self.num_calls += 1
        if cached is not None:
            self.num_hits += 1
            return [tuple(response) if isinstance(response, list) else response for response in cached]
        responses = compute()
        collectives.run_on_rank0(lambda: write_json(path, {"settings": self.settings, "answers": responses}))
        return responses

    @property
    def has_everything(self) -> bool:
        """Whether nothing had to be computed."""
        return 0 < self.num_calls == self.num_hits


def read_responses(path: Path, count: int) -> list | None:
    """The responses in a file; None where there is no such file, or it is damaged."""
    try:
        responses = json.loads(path.read_text(encoding="utf-8"))["answers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return responses if isinstance(responses, list) and len(responses) == count else None
