"""Training rows as the model sees them: tokenising, and an order that does not depend on who trains.

Sample order is a function of seed and epoch alone. The rows of a global batch are the same at any world
size and any split into micro-batches; only who computes which of them differs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from speft_ds.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token ids of prompt + response + end of sequence; loss on everything from `num_prompt` on."""

    ids: list[int]
    num_prompt: int

    @property
    def num_labels(self) -> int:
        return len(self.ids) - self.num_prompt


def tokenize(
    rows: list[tuple[str, str]], tokenizer, chat_template: bool, max_length: int, where: str = "data.path"
) -> list[Row]:
    """Prompt and response are tokenised apart, so that the loss starts exactly at the response.

    Args:
        chat_template: wrap the prompt as the user's message of the tokenizer's chat template.
        max_length: tokens a row may have.
        where: what an error says of where the rows are.
    Raises:
        UserError: no chat template, no end-of-sequence token, or a row longer than `max_length`.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", where="model.name_or_path")
    if chat_template and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template", where="data.chat_template", fix="data.chat_template=false"
        )
    result = []
    for number, (prompt, response) in enumerate(rows, start=1):
        if chat_template:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            # The template writes the special tokens itself: adding them again would double the BOS.
            prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            prompt_ids = plain_prompt_ids(tokenizer, prompt)
        response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        row = Row([*prompt_ids, *response_ids, tokenizer.eos_token_id], len(prompt_ids))
        if len(row.ids) > max_length:
            raise UserError(
                f"row {number} has {len(row.ids)} tokens, more than data.max_length={max_length}",
                where=where,
                fix=f"data.max_length={len(row.ids)}, or shorten or delete the row",
            )
        result.append(row)
    return result


def plain_prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The prompt with exactly one BOS where the tokenizer has the habit of adding one."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos and ids[:1] != [tokenizer.bos_token_id] else ids


@lru_cache(maxsize=4)
def permutation(num_rows: int, seed: int, purpose: str, epoch: int = 0) -> list[int]:
    """A shuffle of the rows that depends on its arguments alone."""
    generator = torch.Generator().manual_seed(hash_seed(seed, purpose, epoch))
    return torch.randperm(num_rows, generator=generator).tolist()


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from printable parts, the same in every process."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def global_batch_ids(num_rows: int, seed: int, step: int, global_batch: int) -> list[int]:
    """Row numbers of one step's global batch: epochs follow each other without a gap."""
    first = step * global_batch
    ids = []
    for epoch in range(first // num_rows, (first + global_batch - 1) // num_rows + 1):
        order = permutation(num_rows, seed, "order", epoch)
        start = max(0, first - epoch * num_rows)
        ids += order[start : first + global_batch - epoch * num_rows]
    return ids


def num_steps(num_rows: int, global_batch: int, steps: int | None, epochs: float | None) -> int:
    """Steps of the run; a last incomplete global batch is filled from the next epoch."""
    return steps if steps is not None else math.ceil(num_rows * epochs / global_batch)


def split_global_batch(rows: list[Row], micro_batch: int, rank: int, world_size: int) -> list[list[Row]]:
    """This rank's micro-batches of a global batch, one a accumulation step.

    Rows are dealt by length, so that the rows of one micro-batch, and the ranks' micro-batches that run
    side by side, are about equally long.
    """
    by_length = sorted(rows, key=lambda row: -len(row.ids))
    per_round = micro_batch * world_size
    rounds = [by_length[start : start + per_round] for start in range(0, len(rows), per_round)]
    return [dealt[rank::world_size] for dealt in rounds]


def collate(rows: list[Row], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded [rows, longest] int64 `input_ids` and `labels` (IGNORED on prompt and padding).

    No attention mask: under causal attention no real token sees the padding behind it.
    """
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for number, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        input_ids[number, : len(ids)] = ids
        labels[number, row.num_prompt : len(ids)] = ids[row.num_prompt :]
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}


def num_logits(labels: Tensor) -> int:
    """How many positions, counted from the end, take part in the loss of [rows, tokens] labels."""
    first_label = int((labels != IGNORED).any(0).nonzero()[0])
    return labels.shape[1] - first_label + 1  # the token before a label predicts it


def summed_loss(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of the token cross-entropies (fp32) of [rows, tokens, vocabulary] logits at the labelled tokens.

    Args:
        temperature: the logits are divided by it.
    """
    predicted = labels[:, 1:] != IGNORED
    scaled = logits[:, :-1][predicted].float() / temperature
    return torch.nn.functional.cross_entropy(scaled, labels[:, 1:][predicted], reduction="sum")
