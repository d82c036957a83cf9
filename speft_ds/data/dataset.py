"""Tokenised rows: one sequence in memory, packs of several, and a file that is read row by row.

Imports no torch to read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from speft_ds.data.sampler import Sampler
from speft_ds.errors import UserError, shell
from speft_ds.io import decode_json


@dataclass(frozen=True)
class Row:
    """One sequence as the model sees it: a row, or several packed ones.

    Attributes:
        ids: token ids.
        loss_mask: of each token, whether the loss is on it: a label token. A row's first token never is one.
        starts: where each of the packed rows begins.
        label: the class, for sequence classification; then there are no label tokens.
    """

    ids: list[int]
    loss_mask: list[bool]
    starts: list[int] = field(default_factory=lambda: [0])
    label: int | None = None

    @property
    def num_labels(self) -> int:
        """What the loss is a sum over: label tokens, or one class."""
        return sum(self.loss_mask) if self.label is None else 1

    def as_text(self, tokenizer) -> list[tuple[str, bool]]:
        """The row as pieces of text, each with whether the loss is on it."""
        pieces, start = [], 0
        for is_label, tokens in groupby(self.loss_mask):
            stop = start + len(list(tokens))
            pieces.append((tokenizer.decode(self.ids[start:stop]), bool(is_label)))
            start = stop
        return pieces if self.label is None else [*pieces, (f"class {self.label}", True)]


def pack(rows: list[Row]) -> Row:
    """The rows as one sequence, one after the other."""
    ids, loss_mask, starts = [], [], []
    for row in rows:
        starts.append(len(ids))
        ids += row.ids
        loss_mask += row.loss_mask
    return Row(ids, loss_mask, starts)


def first_fit(lengths: Sequence[int], capacity: int, opened: Sequence[int] = ()) -> list[list[int]]:
    """Put each item, in order, into the first pack that still has room for it.

    Args:
        lengths: of the items, each at most `capacity`, that of a pack.
        opened: how full the first packs are.
    Returns:
        The packs, each the numbers of its items in ascending order.
    """
    num_leaves = 1 << max(0, len(opened) + len(lengths) - 1).bit_length()
    # A tree over all packs there can be: each node holds the most room of a pack below it, so the first
    # pack with room is found in log(n) steps, not by trying all that are open.
    room = [capacity] * (2 * num_leaves)
    room[num_leaves : num_leaves + len(opened)] = [capacity - length for length in opened]
    for node in range(num_leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    packs: list[list[int]] = [[] for _ in opened]
    for number, length in enumerate(lengths):
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        first = node - num_leaves
        if first == len(packs):
            packs.append([])
        packs[first].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def pack_groups(groups: Sequence[Sequence[int]], capacity: int) -> list[list[list[int]]]:
    """Put the rows of each group, like those of a conversation, into one pack or, where that cannot hold them
    all, into packs of its own, the last of which takes other groups in.

    Args:
        groups: the lengths of the rows of each, each at most `capacity`, that of a pack.
    Returns:
        The packs that belong together, each the numbers of its rows over all groups.
    """
    found: list[list[list[int]]] = []
    small: list[list[int]] = []  # the rows of each group that fits into one pack
    opened: list[int] = []
    small_lengths, row = [], 0
    for lengths in groups:
        own: list[list[int]] = [[]]
        filled = 0
        for length in lengths:
            if filled + length > capacity:
                own.append([])
                filled = 0
            own[-1].append(row)
            filled += length
            row += 1
        if len(own) == 1:
            small.append(own[0])
            small_lengths.append(filled)
        else:
            found.append(own)
            opened.append(filled)
    for number, pack in enumerate(first_fit(small_lengths, capacity, opened)):
        rows = [row for group in pack for row in small[group]]
        if number < len(opened):
            found[number][-1] += rows
        else:
            found.append([rows])
    return found


class TokenizedDataset(Sequence[Row]):
    """The sequences of a run: rows or, with packing, packs of rows.

    Args:
        path: a file that `write_dataset` wrote.

    Attributes:
        lengths, num_label_tokens: [rows] tokens of each row, and how many of them are label tokens.
        sizes, row_sizes: sequences and rows of each source; those of a source follow each other.
        facts: what was done to the rows: `sources` (a dict of counts for each), `classes` (names, or None),
            `notes` (lines for the user), `end_of_turn` (a label token that rows end with -> how many do),
            `samples` (see `Row.as_text`), `sha256` of all rows and packs.
    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            file = safe_open(path, framework="np")
            self.facts = decode_json(file.metadata()["facts"])
            self._ids, self._loss_mask = file.get_slice("ids"), file.get_slice("loss_mask")
            self._row_edges, self._pack_edges = file.get_tensor("row_edges"), file.get_tensor("pack_edges")
            self._labels, self._packs = file.get_tensor("labels"), file.get_tensor("packs")
            self.num_label_tokens = file.get_tensor("num_label_tokens")
            self._edges, self._counts = file.get_tensor("group_edges"), file.get_tensor("group_counts")
            self.sizes, self.row_sizes = map(tuple, file.get_tensor("sizes").tolist())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not readable: {error}", str(path), shell("rm", path)) from error
        self.lengths = np.diff(self._row_edges)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def is_packed(self) -> bool:
        return len(self._pack_edges) > 1

    def __len__(self) -> int:
        return len(self._pack_edges) - 1 if self.is_packed else self.num_rows

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if not self.is_packed:
            return self._row(number)
        first, last = self._pack_edges[number : number + 2]
        return pack([self._row(row) for row in self._packs[first:last]])

    def _row(self, number: int) -> Row:
        start, stop = self._row_edges[number : number + 2]
        label = int(self._labels[number]) if len(self._labels) else None
        return Row(self._ids[start:stop].tolist(), self._loss_mask[start:stop].tolist(), label=label)

    def order(self, weights: Sequence[float] | None, seed: int) -> Sampler:
        """In which order a run trains on the sequences; those of a conversation together, counted once."""
        edges, counts = self._edges.tolist(), self._counts.tolist()
        return Sampler(self.sizes, weights, seed, edges=edges, counts=counts)

    def num_packs(self, capacity: int) -> int:
        """How many packs of this many tokens its rows would be, where they are not packed."""
        return sum(map(len, pack_groups(np.split(self.lengths, self._edges[1:-1]), capacity)))

    @property
    def num_labels(self) -> int:
        """Label tokens or, for sequence classification, classes of all rows."""
        return len(self._labels) or int(self.num_label_tokens.sum())

    def rows(self) -> TokenizedDataset:
        """The same rows without packing, for calibration; they have no `order`."""
        unpacked = copy.copy(self)
        unpacked.sizes, unpacked._pack_edges = self.row_sizes, self._pack_edges[:1]
        return unpacked


def write_dataset(path: Path, by_source: list[list[list[Row]]], capacity: int | None, facts: dict) -> None:
    """Write the file of a `TokenizedDataset`, completely or not at all.

    Args:
        by_source: the rows of each source, in groups that belong together, like those of a conversation.
        capacity: tokens of a pack; None: the rows are not packed.
        facts: see `TokenizedDataset`.
    Raises:
        OSError: it cannot be written.
    """
    import torch

    from speft_ds.io import write_safetensors

    rows = [row for groups in by_source for group in groups for row in group]
    groups: list[Sequence] = [group for groups in by_source for group in groups]
    row_sizes = [sum(map(len, groups)) for groups in by_source]
    sizes, counts, packs = row_sizes, [1] * len(groups), []
    if capacity is not None:
        firsts = accumulate(row_sizes, initial=0)
        packed = [_packed(*source, capacity) for source in zip(by_source, firsts, strict=False)]
        sizes = [sum(map(len, some)) for some in packed]
        of_group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        groups = [group for some in packed for group in some]
        counts = [len(np.unique(of_group[np.concatenate(group)])) for group in groups]
        packs = [pack for group in groups for pack in group]
    arrays = {
        "ids": _concatenate((row.ids for row in rows), np.int32),
        "loss_mask": _concatenate((row.loss_mask for row in rows), np.bool_),
        "num_label_tokens": np.array([np.count_nonzero(row.loss_mask) for row in rows], np.int64),
        "row_edges": _edges(row.ids for row in rows),
        "labels": np.array([row.label for row in rows if row.label is not None], np.int32),
        "packs": _concatenate(packs, np.int64),
        "pack_edges": _edges(packs),
        "group_edges": _edges(groups),
        "group_counts": np.array(counts, np.int64),
        "sizes": np.array([sizes, row_sizes]),
    }
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_safetensors(path, tensors, {"facts": json.dumps({**facts, "sha256": digest.hexdigest()})})


def _packed(groups: list[list[Row]], first: int, capacity: int) -> list[list[np.ndarray]]:
    """The packs of a source that belong together, each the numbers of its rows, from `first` on."""
    found = pack_groups([[len(row.ids) for row in group] for group in groups], capacity)
    return [[np.add(first, pack) for pack in group] for group in found]


def _edges(parts: Iterable[Sequence]) -> np.ndarray:
    """Where each of the parts begins when they are laid end to end, and where the last one ends."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _concatenate(parts: Iterable[Sequence], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])
