"""The exact k-th largest score over all ranks, by radix select on all-reduced histograms.

Scores stay where they are, sharded; only histograms (order of the number of groups) travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from speft_ds.comm import collectives

Groups = dict[str, int]  # weight -> number of the group that it competes in

# 32 score bits, most significant first: three histograms of at most 2,048 bins a group.
DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits)
LOWEST_KEY = -(2**31)
CHUNK = 2**17  # scores handled at once on the CPU: their temporaries stay in a core's cache
LARGE_CHUNK = 2**26  # elsewhere: they stay small beside the scores


def sortable_key(score: Tensor) -> Tensor:
    """Order-preserving map of fp32 scores to int32; -0.0 and 0.0 get one key."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)
    # Negative floats sort in reverse by magnitude: flip their bits below the sign.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def score_of(key: int) -> float:
    """The fp32 score of a key; an infinity for keys beyond those of finite scores."""
    if key >= 0x7F800000 or key <= -0x7F800001:
        return math.copysign(math.inf, key)
    bits = torch.tensor([key ^ 0x7FFFFFFF if key < 0 else key], dtype=torch.int32)
    return bits.view(torch.float32).item()


def find_thresholds(
    scores: dict[str, Tensor], group: Groups, counts: list[int], sizes: dict[str, Tensor] | None = None
) -> tuple[list[float], Tensor]:
    """The exact score, over all ranks, down to which each group's budget reaches.

    Args:
        scores: weight -> [local elements] fp32 scores of this rank.
        group: weight -> group number; counts: entries wanted by each group.
        sizes: weight -> [local elements] int64 entries that each score stands for; None: one each.
    Returns:
        the threshold score of each group (infinity where nothing is wanted), and [groups] int64 numbers
        of entries still wanted from scores equal to it, after taking every larger one.
    """
    wanted = torch.tensor(counts, dtype=torch.int64)
    prefix = torch.full((len(counts),), LOWEST_KEY, dtype=torch.int64)
    # Weight -> scores (later, keys) still in question, and their sizes.
    survivors = {name: (score, sizes[name] if sizes else None) for name, score in scores.items()}
    for shift, bits in DIGITS:
        histogram = torch.zeros(len(counts), 2**bits, dtype=torch.int64)
        for name, (values, size) in survivors.items():
            histogram[group[name]] += count_digits(values, shift, bits, size)
        histogram = collectives.all_reduce(histogram.to(collectives.device())).cpu()
        # at_least[g, d]: survivors of group g with this digit >= d
        at_least = histogram.flip(1).cumsum(1).flip(1)
        digit = ((at_least >= wanted[:, None].clamp(min=1)).sum(1) - 1).clamp_(min=0)
        above = at_least.gather(1, digit[:, None])[:, 0] - histogram.gather(1, digit[:, None])[:, 0]
        wanted = (wanted - above).clamp(min=0)
        prefix = prefix + (digit << shift)
        for name, (values, size) in survivors.items():
            first = int(prefix[group[name]])
            survivors[name] = within(values, first, first + 2**shift - 1, size)
    nothing = torch.tensor(counts) == 0
    wanted[nothing] = 0
    limits = [math.inf if none else score_of(key) for none, key in zip(nothing, prefix.tolist(), strict=True)]
    return limits, wanted


def count_digits(values: Tensor, shift: int, bits: int, size: Tensor | None) -> Tensor:
    """[2^bits] int64 on the CPU: how many (or what sizes of) scores, or int32 keys, have each digit."""
    counts = torch.zeros(2**bits, dtype=torch.int64)
    step = chunk_size(values)
    for start in range(0, values.numel(), step):
        chunk = values[start : start + step]
        key = chunk if chunk.dtype == torch.int32 else sortable_key(chunk)
        # The first digit holds the sign: shifted down, it runs from -2^(bits - 1).
        digit = (key >> shift) + 2 ** (bits - 1) if shift + bits == 32 else (key >> shift) & (2**bits - 1)
        weights = None if size is None else size[start : start + step].double()  # exact up to 2^53
        counts += torch.bincount(digit, weights=weights, minlength=2**bits).to("cpu", torch.int64)
    return counts


def within(values: Tensor, first: int, last: int, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The int32 keys from `first` to `last` among scores (or keys), and their sizes."""
    if values.dtype == torch.int32:
        where = ((values >= first) & (values <= last)).nonzero()[:, 0]
        keys = values[where]
    else:
        low, high = score_of(first), score_of(last)
        where = positions(values, lambda chunk: (chunk >= low) & (chunk <= high))
        keys = sortable_key(values[where])
        exact = (keys >= first) & (keys <= last)  # 0.0 and -0.0 compare equal, whatever their bin
        where, keys = where[exact], keys[exact]
    return keys, None if size is None else size[where]


def positions(values: Tensor, chosen: Callable[[Tensor], Tensor]) -> Tensor:
    """Sorted int64 positions where `chosen(values)` is True, found a chunk at a time."""
    step = chunk_size(values)
    pieces = [chosen(chunk).nonzero()[:, 0] + n * step for n, chunk in enumerate(values.split(step))]
    return torch.cat(pieces)


def chunk_size(values: Tensor) -> int:
    """How many values to handle at once where they are."""
    return CHUNK if values.device.type == "cpu" else LARGE_CHUNK
