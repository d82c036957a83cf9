"""Smaller adapters: fewer entries, simpler deltas, shorter numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from speft_ds.adapter.derive import Entries, check_output, history, no_entries, open_adapter, write_derived
from speft_ds.adapter.format import TENSORS, Adapter
from speft_ds.adapter.largest import Largest
from speft_ds.data.sampler import hash_seed
from speft_ds.errors import UserError

METHODS = ("dare", "ternary", "topk")
UNIFORM_BITS = 53


@dataclass(frozen=True)
class Sizes:
    """Entries, and bytes of adapter.safetensors, before and after."""

    entries: tuple[int, int]
    bytes: tuple[int, int]


def drop_and_rescale(entries: Entries, name: str, keep: float, seed: int) -> Entries:
    """DARE: drop each entry with probability 1 - keep, and divide the others by `keep` (Yu et al. 2024).

    Whether an entry stays depends on the seed, the weight's name and the entry's index, and on nothing else.
    """
    from speft_ds.model.fingerprint import mix64  # late, because it imports DeepSpeed

    index, delta = entries
    random = mix64(index + hash_seed(seed, "dare", name)) & (2**UNIFORM_BITS - 1)
    kept = random < round(keep * 2**UNIFORM_BITS)
    return index[kept], delta[kept] / keep


def largest_entries(entries: Entries, largest: Largest) -> Entries:
    """The entries of a weight that are among the largest of the adapter; weights in the adapter's order."""
    index, delta = entries
    positions = largest.take(delta)
    return index[positions], delta[positions]


def signs(entries: Entries, size: float) -> Entries:
    """ComPEFT's ternary deltas: `size` with the sign of each delta; entries whose delta is 0 are dropped."""
    index, delta = entries
    chosen = delta != 0
    return index[chosen], delta[chosen].sign() * size


def standard_deviation(adapter: Adapter) -> float:
    """Of all deltas of an adapter, about their mean."""
    count = total = squares = 0.0
    for name in adapter.names:
        delta = adapter.entries(name)[1].double()
        count, total = count + delta.numel(), total + float(delta.sum())
        squares += float(delta.square().sum())
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))


def compress(
    source: str | Path,
    output: str | Path,
    method: str | None = None,
    keep: float = 1.0,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Sizes:
    """Write a smaller adapter. A classifier's head is kept as it is.

    Args:
        source: an adapter, or the folder of a run; output: the new adapter's folder.
        method: `dare` (see `drop_and_rescale`); `topk`, the largest deltas; `ternary`: of the largest deltas
            the signs, times one number for all, `scale` standard deviations of all deltas (ComPEFT, Yadav
            et al. 2023); None: all entries as they are.
        keep: fraction of the entries to keep, in (0, 1]; with `dare`, of each the probability.
        seed: of `dare`.
        dtype: of the deltas on disk, fp32 or bf16; None: as they are.
    Raises:
        UserError: an option out of range, or an adapter that cannot be read or written.
    """
    _check(method, keep, scale)
    adapter = open_adapter(source)
    check_output(output)
    dtype = dtype or adapter.delta_dtype()
    smaller = _compressor(adapter, method, keep, seed, scale)
    step = _options(method, keep, seed, scale) | {"dtype": str(dtype).removeprefix("torch.")}
    facts = {**adapter.facts, "history": history([adapter], step)}
    heads = {name: adapter.head(name) for name in adapter.heads}

    def entries(name: str) -> Entries:
        return smaller(name, adapter.entries(name)) if name in adapter.shape else no_entries()

    write_derived(output, facts, entries, heads, dtype)
    after = Adapter.open(output)
    return Sizes((adapter.num_entries, after.num_entries), (num_bytes(adapter), num_bytes(after)))


def _options(method: str | None, keep: float, seed: int, scale: float) -> dict:
    """What of the options a method uses, for the adapter's history."""
    extra = {"dare": {"seed": seed}, "ternary": {"scale": scale}}.get(method, {})
    return {"command": "compress"} | ({"method": method, "keep": keep, **extra} if method else {})


def _compressor(
    adapter: Adapter, method: str | None, keep: float, seed: int, scale: float
) -> Callable[[str, Entries], Entries]:
    """What becomes of the entries of each weight, weights in the adapter's order."""
    if method is None:
        return lambda name, entries: entries
    if method == "dare":
        return lambda name, entries: drop_and_rescale(entries, name, keep, seed)
    wanted = max(1, round(keep * adapter.num_entries))
    largest = Largest.find(lambda: (adapter.entries(name)[1] for name in adapter.names), wanted)
    if method == "topk":
        return lambda name, entries: largest_entries(entries, largest)
    size = scale * standard_deviation(adapter)
    if size == 0.0:
        raise UserError("all deltas are equal: they have no standard deviation", where=str(adapter.folder))
    return lambda name, entries: signs(largest_entries(entries, largest), size)


def num_bytes(adapter: Adapter) -> int:
    """Of adapter.safetensors."""
    return (adapter.folder / TENSORS).stat().st_size


def _check(method: str | None, keep: float, scale: float) -> None:
    if method not in (None, *METHODS):
        raise UserError(f"there is no method {method}", "--method", f"choose from: {', '.join(METHODS)}")
    if not 0.0 < keep <= 1.0:
        raise UserError(f"--keep is {keep}", "--keep", "a fraction > 0 and <= 1, like --keep 0.1")
    if keep < 1.0 and method is None:
        raise UserError("--keep does not say which entries", "--keep", "add --method dare, ternary or topk")
    if not 0.0 < scale < math.inf:
        raise UserError(f"--scale is {scale}", "--scale", "a number > 0, like --scale 1.0")
