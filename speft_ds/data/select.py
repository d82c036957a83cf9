"""Selection of the rows that are trained on: `data.select`, with IFD scores by a small model.

Instruction-following difficulty is how little a prompt helps with its response: Li et al., "From Quantity to
Quality" (NAACL 2024). A small scorer ranks rows as a large one does: Li et al., "Superfiltering" (ACL 2024).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from speft_ds import hub
from speft_ds.comm import watchdog
from speft_ds.config.data_config import DataConfig
from speft_ds.data.collate import IGNORED, collate, num_logits
from speft_ds.data.dataset import Row
from speft_ds.data.readers import hash_model
from speft_ds.data.sampler import permutation
from speft_ds.data.tokenize import load_tokenizer
from speft_ds.env import cache_folder
from speft_ds.errors import UserError
from speft_ds.io import parse_json, write_json

IFD_VERSION = 2  # of the scores: to be raised whenever the same rows and scorer would get others
MAX_TOKENS = 1024  # of prompt and response together, or the scorer's context where that is shorter
# Padded tokens of a batch (one row at least). They bound the logits, which are a vocabulary wide.
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
WHERE = "data.scorer"


def select_rows(
    rows: Sequence[Row], texts: Sequence[tuple[str, str]], data: DataConfig, seed: int
) -> set[int]:
    """Numbers of the rows that `data.select` takes.

    Args:
        rows: of all sources together.
        texts: (prompt, response) of each; used by `ifd` alone.
        seed: of the recipe, for `random`.
    Raises:
        UserError: there are fewer than `data.select_rows`.
    """
    k = data.select_rows
    if k > len(rows):
        what = f"data.select_rows={k} is more than the {len(rows)} rows there are"
        raise UserError(what, "data.select_rows", f"data.select_rows={len(rows)}, or data.select=all")
    if data.select == "longest":
        # By tokens of the response (Zhao et al., "Long Is More for Alignment", 2024); ties by position.
        return set(sorted(range(len(rows)), key=lambda number: -rows[number].num_labels)[:k])
    if data.select == "random":
        return set(permutation(len(rows), seed, "select")[:k])
    return hardest(ifd_scores(texts, data.scorer), k)


def hardest(scores: Sequence[float], k: int) -> set[int]:
    """The k rows with the highest IFD below 1; of equal ones the first.

    Fewer than k where fewer are below 1: a row of 1 or more does not follow from its prompt.
    """
    eligible = [number for number, score in enumerate(scores) if score < 1]
    return set(sorted(eligible, key=lambda number: -scores[number])[:k])  # sorted keeps ties in order


def ifd_scores(pairs: Sequence[tuple[str, str]], scorer: str | Path) -> list[float]:
    """IFD of each row: perplexity of the response after its prompt / perplexity of the response alone.

    Below 1 the prompt helps; the higher, the less. Kept in the cache folder: the same rows and scorer are
    not scored twice. Runs on the current GPU or, where there is none, the CPU; call it on one rank alone.

    Args:
        pairs: (prompt, response) texts, scored as one text: a separator between them is part of the prompt.
            Where the two have too many tokens, the response loses its end, the prompt its middle.
        scorer: local folder or hub name of a small causal language model.
    Returns:
        One ratio >= 0 per row, in the rows' order.
    Raises:
        UserError: the scorer cannot be loaded, has neither BOS nor EOS, or has no finite loss on a row; a
            response has no tokens.
    """
    if not pairs:
        return []
    folder = find_scorer(scorer)
    # The dtype is part of the key: what a run trains on must not depend on which machine scored first.
    dtype = choose_dtype()
    files = hash_model(folder, with_weights=True)
    key = _hash_json([IFD_VERSION, MAX_TOKENS, str(dtype), files, [*map(list, pairs)]])
    path = cache_folder("ifd") / f"{key}.json"
    scores = _read_cache(path)
    if scores is None:
        scores = _score(pairs, *_load(folder, scorer, dtype))
        _write_cache(path, scores)
    return scores


def choose_dtype() -> torch.dtype:
    """What the scorer computes in: fp32 on all CPUs, so that their scores agree; few multiply bf16 faster."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _cut(prompt: list[int], response: list[int], room: int) -> tuple[list[int], list[int]]:
    """Token ids shortened to `room` together, where they are longer.

    The response keeps its first tokens: as many as the prompt leaves it, or half of the room if that is
    more. The prompt keeps its beginning and its end, where the task and the last question stand.
    """
    response = response[: max(room - len(prompt), room // 2)]
    excess = max(0, len(prompt) + len(response) - room)
    head = (len(prompt) - excess + 1) // 2
    return prompt[:head] + prompt[head + excess :], response


def _score(pairs: Sequence[tuple[str, str]], model: nn.Module, tokenizer) -> list[float]:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    prompted, alone = _tokenize(pairs, tokenizer, min(context, MAX_TOKENS))
    with tqdm(total=2 * len(pairs), desc="IFD", unit="text", disable=None) as bar:  # on a terminal only
        # Apart: beside rows without a prompt, the logits of the others' prompts would be computed too.
        with_prompt = _mean_losses(model, prompted, bar)
        without = _mean_losses(model, alone, bar)
    # Perplexities themselves may overflow. No order is lost by the limit: only rows below 1 are ranked.
    return [math.exp(min(a - b, 700.0)) for a, b in zip(with_prompt, without, strict=True)]


def _tokenize(pairs: Sequence[tuple[str, str]], tokenizer, max_tokens: int) -> tuple[list[Row], list[Row]]:
    """Rows with and without the prompt: the same response ids, after the same first token.

    The response's first token needs one before it, and the two should differ by the prompt alone.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        fix = "choose a scorer whose tokenizer has one"
        raise UserError("the scorer's tokenizer has neither a BOS nor an EOS token", WHERE, fix)
    options = {"add_special_tokens": False, "verbose": False}  # not verbose: long rows are expected here
    prompts = tokenizer([prompt for prompt, _ in pairs], **options)["input_ids"]
    responses = tokenizer([response for _, response in pairs], **options)["input_ids"]
    prompted, alone = [], []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), 1):
        if not response:
            raise UserError(f"row {number}: the response has no tokens", WHERE, "complete or delete the row")
        prompt = prompt[1:] if prompt[:1] == [first] else prompt  # never two
        prompt, response = _cut(prompt, response, max_tokens - 1)
        for rows, before in ((prompted, [first, *prompt]), (alone, [first])):
            rows.append(Row(before + response, [False] * len(before) + [True] * len(response)))
    return prompted, alone


@torch.inference_mode()
def _mean_losses(model: nn.Module, rows: list[Row], bar: tqdm) -> list[float]:
    """Mean cross-entropy of each row's response tokens, in nats."""
    can_keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    losses = [math.nan] * len(rows)
    for numbers in _batches(rows, BATCH_TOKENS[model.device.type]):
        watchdog.heartbeat(f"scoring rows, up to row {max(numbers) + 1}")
        batch = collate([rows[number] for number in numbers], 0, model.device)
        options = {"logits_to_keep": num_logits(batch["labels"])} if can_keep_logits else {}
        logits = model(input_ids=batch["input_ids"], use_cache=False, **options).logits
        labels = batch["labels"][:, -logits.shape[1] :]
        means = torch.stack([_mean_loss(*row) for row in zip(logits, labels, strict=True)]).tolist()
        for number, loss in zip(numbers, means, strict=True):
            if not math.isfinite(loss):
                fix = "shorten or delete the row, or choose another scorer"
                raise UserError(f"row {number + 1}: the scorer's loss on it is {loss}", WHERE, fix)
            losses[number] = loss
        bar.update(len(numbers))
    return losses


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of [tokens, vocabulary] logits at the [tokens] labels of a row."""
    predicted = labels[1:] != IGNORED  # by the token before
    # In fp32 row by row: a whole batch of that would take several times the memory of the bf16 logits.
    return nn.functional.cross_entropy(logits[:-1][predicted].float(), labels[1:][predicted])


def _batches(rows: list[Row], num_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest first, so that memory that does not suffice runs out early."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    start = 0
    while start < len(order):
        size = max(1, num_tokens // len(rows[order[start]].ids))
        yield order[start : start + size]
        start += size


def find_scorer(scorer: str | Path) -> Path:
    """The folder that holds the scorer's files; a model on the hub is downloaded first."""
    if Path(scorer).is_dir():
        return Path(scorer)
    from huggingface_hub import snapshot_download

    download = partial(snapshot_download, str(scorer), ignore_patterns=["*/*"])  # no other formats
    kinds = (*hub.CONFIG_SUFFIXES, ".safetensors")
    try:
        folder = Path(download(allow_patterns=[f"*{kind}" for kind in kinds]))
        if not any(folder.glob("*.safetensors")):  # an old model: its weights are pickled
            folder = Path(download(allow_patterns=["*.bin"]))
    except (OSError, ValueError) as error:
        raise _cannot_load(scorer, error) from error
    return folder


def _load(folder: Path, scorer: str | Path, dtype: torch.dtype):
    """The model in evaluation mode, on the current GPU if there is one, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    try:
        tokenizer = load_tokenizer(str(folder), WHERE)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    # A damaged file makes transformers and tokenizers raise anything: KeyError, IndexError, SafetensorError.
    except Exception as error:
        raise _cannot_load(scorer, f"{type(error).__name__}: {error}") from error
    if info["missing_keys"]:
        raise _cannot_load(scorer, f"the checkpoint lacks {sorted(map(str, info['missing_keys']))[:5]}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _cannot_load(scorer: str | Path, problem: object) -> UserError:
    fix = "a folder with config.json, weights and tokenizer, or the name of a small causal model on the hub"
    return UserError(f"cannot load the scorer {scorer}: {problem}", WHERE, fix)


def _hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_cache(path: Path) -> list[float] | None:
    """The scores as they were written; None where there are none, or not those any more."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))  # of any size
        scores, digest = document["scores"], document["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: JSON, but no object
        return None
    return scores if digest == _hash_json(scores) else None


def _write_cache(path: Path, scores: list[float]) -> None:
    # Jobs that race write the same scores, so there is no lock: some network file systems have none.
    try:
        write_json(path, {"scores": scores, "sha256": _hash_json(scores)})
    except OSError as error:  # a full disk must not cost the scores that have just been computed
        warnings.warn(f"the IFD scores are not kept: {error}", stacklevel=2)
