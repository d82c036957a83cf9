"""Batches: how a global batch is split, and rows become tensors."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from speft_ds.data.dataset import Row

IGNORED = -100


def split_global_batch(rows: list[Row], micro_batch: int, rank: int, world_size: int) -> list[list[Row]]:
    """This rank's micro-batches of a global batch, one per accumulation step.

    Rows are dealt by length, so that the rows of one micro-batch, and the ranks' micro-batches that run
    side by side, are about equally long.
    """
    by_length = sorted(rows, key=lambda row: -len(row.ids))
    per_round = micro_batch * world_size
    rounds = [by_length[start : start + per_round] for start in range(0, len(rows), per_round)]
    return [dealt[rank::world_size] for dealt in rounds]


def collate(rows: list[Row], pad_id: int, device: torch.device) -> dict[str, Tensor | int]:
    """Right-padded [rows, longest] int64 `input_ids`, and `labels` (IGNORED where the loss is not).

    `predicting` [n] says which tokens predict a label, of all the batch's tokens laid end to end, and
    `targets` [n] what; `num_logits` (int) how many positions of a row, counted from the end, they are among.
    They are found here, where the tensors are on the CPU: a GPU would be waited for.

    Where rows are packed, also `position_ids`, which restart at each of them: from these the model's
    attention tells the rows apart. There, and of a single row, `cu_seq_lens` [n + 1] int32 says where each
    of them starts among all tokens laid end to end, padding being a row of its own, and where the last one
    ends; `max_length` (int) how long the longest is.

    For sequence classification `labels` is [rows], the classes. `lengths` is [rows], on the CPU: the rows'
    tokens without padding.

    No attention mask: under causal attention no real token sees the padding behind it.
    """
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for number, row in enumerate(rows):
        ids, loss_mask = torch.tensor(row.ids), torch.tensor(row.loss_mask, dtype=torch.bool)
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids)] = ids.where(loss_mask, IGNORED)
    batch = {"input_ids": input_ids, "labels": labels}
    if rows[0].label is not None:
        batch["labels"] = torch.tensor([row.label for row in rows])
    else:
        predicted = labels.view(-1)[1:] != IGNORED  # no row's first token is a label
        batch["predicting"] = predicted.nonzero().view(-1)
        batch["targets"] = labels.view(-1)[1:][predicted]
    is_packed = any(len(row.starts) > 1 for row in rows)
    segments = torch.tensor([length for row in rows for length in _segments(row, longest)])
    if is_packed:
        positions = torch.cat([torch.arange(length) for length in segments.tolist()])
        batch["position_ids"] = positions.view(len(rows), longest)
    if is_packed or len(rows) == 1:
        batch["cu_seq_lens"] = F.pad(segments.cumsum(0), (1, 0)).to(torch.int32)
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if "cu_seq_lens" in batch:
        batch["max_length"] = int(segments.max())
    if "predicting" in batch:
        batch["num_logits"] = num_logits(labels)
    return batch | {"lengths": torch.tensor([len(row.ids) for row in rows])}


def _segments(row: Row, length: int) -> list[int]:
    """Tokens of each packed row, and of the padding behind them up to this length, if there is any."""
    edges = [*row.starts, len(row.ids), *([length] if len(row.ids) < length else [])]
    return [stop - start for start, stop in pairwise(edges)]


def num_logits(labels: Tensor) -> int:
    """How many positions, counted from the end, take part in the loss of [rows, tokens] labels."""
    columns = (labels != IGNORED).any(0).nonzero()
    first_label = int(columns[0]) if len(columns) else labels.shape[1]
    return labels.shape[1] - first_label + 1  # the token before a label predicts it
