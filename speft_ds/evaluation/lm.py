"""lm-eval's Hugging Face model over a ZeRO-3 sharded one, with its batches spread over the ranks.

lm-eval itself sees one rank: all ranks build the same requests, so few-shot prompts do not depend on the
world size. The batches are those of lm-eval's own model on one rank; rank b modulo world size computes batch
b, and all ranks get all responses. Where the weights are sharded, every rank takes part in every forward, as
ZeRO-3 demands.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
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
from speft_ds.errors import UserError
from speft_ds.evaluation.eval_jobs import PromptFormat
from speft_ds.io import read_json, write_json

MAX_ANSWERS = 2**30  # bytes of a file of the cache
LOG_EVERY_S = 30.0  # the progress, where there is no terminal to show a bar on; after the first batch, too
LOG_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, about {remaining} left"


class EngineLM(HFLM):
    """The model that lm-eval scores.

    Args:
        model: the engine's module, or a plain copy of it on every rank.
        is_sharded: whether a forward gathers weights, so that the ranks must run the same number of them.
        prompt_format: rewrites the prompts, as `AutoPrompts` does, too; None: they stay as they are.
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
        # Task -> its documents, those whose prompt was cut, those whose answer did not end by itself.
        self.documents, self.cut, self.unended = (defaultdict(set) for _ in range(3))
        self._is_cut: list[bool] = []  # of the requests in hand, as `_is_unended`
        self._is_unended: list[bool] = []

    def loglikelihood(self, requests, disable_tqdm=False):
        def compute(requests: list) -> list[tuple]:
            responses = HFLM.loglikelihood(self, requests, disable_tqdm=True)
            return [(each, is_cut, False) for each, is_cut in zip(responses, self._is_cut, strict=True)]

        return self._respond("loglikelihood", requests, compute)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        def compute(requests: list) -> list[tuple]:
            self.batch_size_per_gpu = 2**62  # all windows in one call: HFLM would pass them on batch by batch
            try:
                responses = HFLM.loglikelihood_rolling(self, requests, disable_tqdm=True)
            finally:
                self.batch_size_per_gpu = self.own_batch_size
            return [(each, False, False) for each in responses]

        return self._respond("loglikelihood_rolling", requests, compute)

    def generate_until(self, requests, disable_tqdm=False):
        return self._respond("generate_until", requests, self._generate)

    def _respond(self, method: str, requests: list[Instance], compute: Callable[[list], list[tuple]]) -> list:
        """The responses; `compute`: requests -> (response, prompt was cut, answer did not end) of each."""
        asked = requests
        if self.prompt_format is not None and method != "loglikelihood_rolling":
            asked = [self._rewrite(request) for request in requests]
        arguments = [request.args for request in asked]
        answers = self.cached(f"{method}, what happened", arguments, lambda: compute(asked))
        for request, (_, is_cut, is_unended) in zip(requests, answers, strict=True):
            for applies, documents in (
                (True, self.documents),
                (is_cut, self.cut),
                (is_unended, self.unended),
            ):
                if applies:
                    documents[request.task_name].add(request.doc_id)
        return [tuple(each) if isinstance(each, list) else each for each, _, _ in answers]

    def _rewrite(self, request: Instance) -> SimpleNamespace:
        arguments = self.prompt_format.rewrite_request(
            request.args, request.task_name, request.doc, request.idx
        )
        self.num_rewritten[request.task_name] += arguments[0] != request.args[0]
        return SimpleNamespace(args=arguments)

    def notes(self) -> list[str]:
        """What happened to prompts and answers, by task: lm-eval only logs it, or does not say it."""

        def of(which: dict[str, set], what: str) -> list[str]:
            return [f"{t}: {len(which[t])} of {len(self.documents[t])} {what}" for t in sorted(which)]

        cut = f"prompts were cut on the left to the {self.max_length} tokens of the model"
        return of(self.cut, cut) + of(self.unended, "answers did not end: they reached max_gen_toks")

    def cached(self, method: str, requests: list[tuple], compute: Callable[[], list]) -> list:
        """The responses from the cache, if there is one, or else computed."""
        return compute() if self.cache is None else self.cache.get(method, requests, compute)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """As in HFLM; with `override_bs`, in the order of the requests and so many at once, at most."""
        score, max_length = super()._loglikelihood_tokens, self.max_length
        lengths = [(len(context), len(continuation)) for _, context, continuation in requests]
        if unfit := [own for _, own in lengths if not 0 < own <= max_length]:
            what = f"{len(unfit)} answers to score have no token, or more than the model's {max_length}"
            raise UserError(what, "eval.tasks", "leave the task out: eval.tasks=[...]")
        self._is_cut = [context + own > max_length + 1 for context, own in lengths]
        if override_bs:
            size, numbered = min(override_bs, self.own_batch_size), list(enumerate(requests))
            batches = [numbered[start : start + size] for start in range(0, len(numbered), size)]
        else:
            batches = likelihood_batches(requests, self.own_batch_size)
        return shard_batches(lambda batch: score(batch, disable_tqdm=True), batches, self.is_sharded)

    def _generate(self, requests: list) -> list[tuple]:
        batches = make_batches(
            requests,
            self.own_batch_size,
            order=lambda request: (-len(self.tok_encode(request.args[0])), request.args[0]),
            settings=lambda request: repr(request.args[1]),
        )
        return shard_batches(self._generate_batch, batches, self.is_sharded)

    def _generate_batch(self, batch: list) -> list[tuple]:
        """(answer, prompt was cut, answer did not end) of each; in the order of `make_batches`, as HFLM's."""
        answers = super().generate_until(batch, disable_tqdm=True)
        return list(zip(answers, self._is_cut, self._is_unended, strict=True))

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self._is_cut = (mask.sum(1) > left_truncate_len).tolist()
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def _model_generate(self, context, max_length, stop, **kwargs):
        # A rank whose sequences are complete keeps running forwards until all are: they gather weights.
        kwargs["synced_gpus"] = self.is_sharded and collectives.world_size() > 1
        tokens = super()._model_generate(context, max_length, stop, **kwargs)
        own = self.model.generation_config.eos_token_id
        ends = {self.eot_token_id, *(own if isinstance(own, list) else [own])}
        self._is_unended = [
            len(row) == max_length - context.shape[1]
            and ends.isdisjoint(row)
            and not any(text and text in self.tok_decode(row, skip_special_tokens=False) for text in stop)
            for row in tokens[:, context.shape[1] :].tolist()
        ]
        return tokens


def likelihood_batches(requests: list[tuple], batch_size: int) -> list[list]:
    """See `make_batches`; requests are lm-eval's: (texts, context tokens, continuation tokens)."""
    return make_batches(
        requests,
        batch_size,
        order=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
        # One forward scores all continuations of one token: lm-eval groups them by this.
        forward=lambda request: tuple(request[1] + request[2][:-1]),
        first=lambda request: -len(request[2]),
    )


def make_batches(
    requests: list,
    batch_size: int,
    order: Callable[[Any], Any],
    forward: Callable[[Any], Hashable] | None = None,
    first: Callable[[Any], int] = lambda _: 0,
    settings: Callable[[Any], str] = lambda _: "",
) -> list[list]:
    """(position, request) pairs in batches, the same for every world size, and those of lm-eval's own model.

    In bfloat16, the other rows of a batch may change a response.

    Args:
        batch_size: forwards per batch, at most.
        order: sort key of a request, longest first.
        forward: requests of equal value share a forward, and so a batch; None: none do.
        first: sort key of the requests of a forward, whose first stands for all of them in `order`.
        settings: requests of different values are in different batches.
    """
    shared: dict[Hashable, list] = defaultdict(list)
    for position, request in enumerate(requests):
        shared[forward(request) if forward else position].append((position, request))
    for group in shared.values():
        group.sort(key=lambda pair: first(pair[1]))
    batches, size, last = [], batch_size, ""
    for group in sorted(shared.values(), key=lambda group: (settings(group[0][1]), order(group[0][1]))):
        own = settings(group[0][1])
        if size == batch_size or own != last:
            batches.append([])
            size, last = 0, own
        batches[-1] += group
        size += 1
    return batches


def shard_batches(compute: Callable[[list], list], batches: list[list], needs_fillers: bool) -> list:
    """The responses to all requests in order, on every rank; each rank computes its share of the batches.

    They are exchanged once, at the end; between batches the ranks only ask each other whether to stop.

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
            is_long = first == 0 and (now - start) * (total - done) > LOG_EVERY_S * done
            if bar.disable and (is_long or now - logged > LOG_EVERY_S):
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
        self.problem = ""  # why responses are not kept, on rank 0

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
        if collectives.rank() == 0:
            try:
                write_json(path, {"settings": self.settings, "answers": responses})
            except OSError as error:  # no reason to lose what was computed
                self.problem = f"the answers of the untouched model are not kept for later runs: {error}"
        return responses

    @property
    def has_everything(self) -> bool:
        """Whether nothing had to be computed."""
        return 0 < self.num_calls == self.num_hits


def read_responses(path: Path, count: int) -> list | None:
    """The responses in a file; None where there is no such file, or it is damaged."""
    try:
        responses = read_json(path, MAX_ANSWERS)["answers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return responses if isinstance(responses, list) and len(responses) == count else None
