"""Smaller adapters: fewer entries, simpler deltas, shorter numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from speft_ds.adapter.format import Adapter, Entries, open_adapter
from speft_ds.adapter.save import check_output, history, write_derived
from speft_ds.data.sampler import hash_seed
from speft_ds.errors import UserError
from speft_ds.model.fingerprint import mix64

METHODS = ("dare", "ternary", "topk")
UNIFORM_BITS = 53
LOW_BITS = 16  # of a magnitude's 32: each pass of `Largest` counts half of them
CHUNK = 2**20  # values handled at once, to bound the temporaries


class Largest:
    """The k largest magnitudes of a stream of tensors, exactly, holding one tensor at a time.

    Two passes find the k-th largest magnitude, by histograms of the upper and the lower halves of its bits,
    which grow with the magnitude; a third, by `take`, takes the values. All passes must see the same tensors
    in the same order: of equal magnitudes, the first are taken.

    Args:
        stream: starts a pass: [n] finite fp32 values at a time.
        k: how many to take, at least 1, and at most as many as there are.
    """

    def __init__(self, stream: Callable[[], Iterable[Tensor]], k: int):
        high, above = _digit(_histogram(stream(), lambda bits: bits >> LOW_BITS), k)
        low_digits = _histogram(stream(), lambda bits: bits[bits >> LOW_BITS == high] & (2**LOW_BITS - 1))
        low, higher = _digit(low_digits, k - above)
        self._threshold = high << LOW_BITS | low  # the bits of the k-th largest magnitude
        self._num_ties = k - above - higher  # how many values of just this magnitude are still to be taken

    def take(self, values: Tensor) -> Tensor:
        """Sorted int64 positions of those of the next [n] values that are taken."""
        bits = values.abs().view(torch.int32)
        positions = (bits >= self._threshold).nonzero()[:, 0]
        is_tie = bits[positions] == self._threshold
        taken = ~is_tie | (is_tie.cumsum(0) <= self._num_ties)
        self._num_ties -= int((is_tie & taken).sum())
        return positions[taken]


def _histogram(tensors: Iterable[Tensor], digit: Callable[[Tensor], Tensor]) -> Tensor:
    """[2^LOW_BITS] int64: how many values of all tensors have each digit."""
    counts = torch.zeros(2**LOW_BITS, dtype=torch.int64)
    for values in tensors:
        for chunk in values.split(CHUNK):
            counts += digit(chunk.abs().view(torch.int32)).bincount(minlength=len(counts))
    return counts


def _digit(histogram: Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th value from above, and how many values lie above it."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    digit = int((at_least >= k).sum()) - 1
    return digit, int(at_least[digit] - histogram[digit])


def compress(
    source: str | Path,
    output: str | Path,
    method: str | None = None,
    keep: float = 1.0,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Write a smaller adapter. Whole weights are kept as they are.

    Args:
        source: an adapter, or the folder of a run; output: the new adapter's folder.
        method: `dare` (see `drop_and_rescale`); `topk`, the largest deltas; `ternary`: of the largest deltas
            the signs, times one number for all, `scale` standard deviations of all deltas (ComPEFT, Yadav
            et al. 2023), without deltas of 0; None: all entries as they are.
        keep: fraction of the entries to keep, in (0, 1]; with `dare`, of each the probability.
        seed: of `dare`.
        dtype: of the deltas on disk, fp32 or bf16; None: as they are.
    Raises:
        UserError: an option out of range, or an adapter that cannot be read or written.
    """
    _check(method, keep, scale)
    adapter = open_adapter(source)
    check_output(output)
    dtype = dtype or adapter.delta_dtype
    compressed = _compressor(adapter, method, keep, seed, scale)
    options = {"dare": {"seed": seed}, "ternary": {"scale": scale}}.get(method, {})
    step = {"command": "compress"} | ({"method": method, "keep": keep, **options} if method else {})
    step["dtype"] = str(dtype).removeprefix("torch.")
    facts = {**adapter.facts, "history": history([adapter], step)}
    whole = {name: adapter.value(name) for name in adapter.whole}
    return write_derived(output, facts, compressed, whole, dtype, adapter.tokenizer)


def _compressor(
    adapter: Adapter, method: str | None, keep: float, seed: int, scale: float
) -> Callable[[str], Entries]:
    """Weight name -> what becomes of its entries; to be called in the adapter's order."""
    if method is None:
        return adapter.entries
    if method == "dare":
        return lambda name: drop_and_rescale(adapter.entries(name), name, keep, seed)
    num_kept = max(1, round(keep * adapter.num_entries))
    largest = Largest(lambda: (adapter.entries(name)[1] for name in adapter.names), num_kept)
    size = scale * _standard_deviation(adapter) if method == "ternary" else 0.0
    if method == "ternary" and size == 0.0:
        what, fix = "all deltas are equal: they have no standard deviation", "--method topk"
        raise UserError(what, str(adapter.folder), fix)

    def take_largest(name: str) -> Entries:
        index, delta = adapter.entries(name)
        positions = largest.take(delta)
        index, delta = index[positions], delta[positions]
        if method == "ternary":
            return index[delta != 0], delta[delta != 0].sign() * size
        return index, delta

    return take_largest


def drop_and_rescale(entries: Entries, name: str, keep: float, seed: int) -> Entries:
    """DARE: drop each entry with probability 1 - keep, and divide the others by `keep` (Yu et al. 2024).

    Whether an entry stays depends on the seed, the weight's name and the entry's index, and on nothing else.
    """
    index, delta = entries
    random = mix64(index + hash_seed(seed, "dare", name)) & (2**UNIFORM_BITS - 1)
    kept = random < round(keep * 2**UNIFORM_BITS)
    return index[kept], delta[kept] / keep


def _standard_deviation(adapter: Adapter) -> float:
    """Of all deltas of an adapter, about their mean."""
    total = squares = 0.0
    for name in adapter.names:
        delta = adapter.entries(name)[1].double()
        total, squares = total + float(delta.sum()), squares + float(delta.square().sum())
    return math.sqrt(max(squares / adapter.num_entries - (total / adapter.num_entries) ** 2, 0.0))


def _check(method: str | None, keep: float, scale: float) -> None:
    if method not in (None, *METHODS):
        raise UserError(f"there is no method {method}", "--method", f"choose from: {', '.join(METHODS)}")
    if not 0.0 < keep <= 1.0:
        raise UserError(f"--keep is {keep}", "--keep", "a fraction > 0 and <= 1, like --keep 0.1")
    if keep < 1.0 and method is None:
        raise UserError("--keep does not say which entries", "--keep", "add --method dare, ternary or topk")
    if not 0.0 < scale < math.inf:
        raise UserError(f"--scale is {scale}", "--scale", "a number > 0, like --scale 1.0")
