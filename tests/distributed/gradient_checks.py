"""The gradient on its way to its owners, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.sparse.gradient import IN_FLIGHT, GradientOptions, SparseGradient
from speft_ds.sparse.mask import Mask

SHAPES = {"a": (7, 5), "b": (16, 16), "c": (1, 1), "d": (33, 8), "e": (4, 4), "f": (64, 32)}


def make_mask(density: float = 0.3) -> Mask:
    """Entries of every weight but `e`, which has none."""
    generator, index = torch.Generator().manual_seed(1), {}
    for name, (rows, columns) in SHAPES.items():
        count = 0 if name == "e" else max(1, round(density * rows * columns))
        index[name] = (
            torch.randperm(rows * columns, generator=generator)[:count].sort().values.to(torch.int32)
        )
    return Mask(index, dict(SHAPES))


def parts_of(mask: Mask, micro_batch: int, rank: int) -> dict[str, Tensor]:
    """What a rank's backward of a micro-batch adds: small whole numbers, whose sums are exact."""
    generator = torch.Generator().manual_seed(100 * micro_batch + rank)
    return {n: torch.randint(-8, 9, (i.numel(),), generator=generator).float() for n, i in mask.index.items()}


def backward(gradient: SparseGradient, parts: dict[str, Tensor], leave_out: str = "") -> None:
    """Add the parts in the order of a backward, the last weight first."""
    for name in reversed(parts):
        if parts[name].numel() and name not in leave_out:
            gradient.add(name, parts[name])


def own_sum(gradient: SparseGradient, micro_batches: int) -> Tensor:
    """The sum over ranks and micro-batches of what this rank owns, by plain indexing."""
    mask, rank = gradient.mask, collectives.rank()
    own = []
    for name in mask.shape:
        total = sum(
            parts_of(mask, number, r)[name]
            for number in range(micro_batches)
            for r in range(collectives.world_size())
        )
        start, stop = gradient.layout.bounds[name][rank], gradient.layout.bounds[name][rank + 1]
        own.append(total[start:stop])
    return torch.cat(own)


@contextmanager
def watching() -> Iterator[list[int]]:
    """Bytes of each reduction, in the order in which they start."""
    start, sizes = collectives.start_reduce_scatter, []

    def watched(pieces: Tensor):
        sizes.append(pieces.numel() * pieces.element_size())
        return start(pieces)

    collectives.start_reduce_scatter = watched
    try:
        yield sizes
    finally:
        collectives.start_reduce_scatter = start


def check_sums(bucket: int, overlap: bool) -> dict:
    """Sums over ranks and micro-batches are exact, for any bucket, during the backward or after it."""
    mask = make_mask()
    gradient = SparseGradient(mask, torch.device("cpu"), GradientOptions(bucket=bucket, overlap=overlap))
    during = []
    for _ in range(2):  # twice the same step
        for number in range(3):
            with watching() as sizes:
                backward(gradient, parts_of(mask, number, collectives.rank()))
                during.append(len(sizes))
                gradient.finish()
        assert torch.equal(gradient.pop(), own_sum(gradient, 3))
        assert not gradient.own.any()
    largest = max((4 * len(bucket.starts) * max(bucket.lengths) for bucket in gradient.buckets), default=0)
    return {
        "buckets": len(gradient.buckets),
        "during": during,
        "most": gradient.peak_buffer_bytes,
        "bound": (IN_FLIGHT + 1) * largest,  # on their way, and one that is filled
        "sent": sum(sizes),
        "least": 4 * mask.num_trainable,
    }


def check_idle_weights() -> None:
    """A weight that one rank does not use, as an expert without tokens, spoils nothing."""
    mask, rank = make_mask(), collectives.rank()
    gradient = SparseGradient(mask, torch.device("cpu"), GradientOptions(bucket=16))
    for number in range(3):
        idle = "bd" if number % 2 == rank % 2 else ""
        backward(gradient, parts_of(mask, number, rank), idle)
        gradient.finish()
        expected = own_sum_of_used(gradient, number)
        assert torch.equal(gradient.pop(), expected), number


def own_sum_of_used(gradient: SparseGradient, number: int) -> Tensor:
    own = []
    for name in gradient.mask.shape:
        bounds, total = gradient.layout.bounds[name], torch.zeros(gradient.mask.index[name].numel())
        for r in range(collectives.world_size()):
            if not (name in "bd" and number % 2 == r % 2):
                total += parts_of(gradient.mask, number, r)[name]
        own.append(total[bounds[collectives.rank()] : bounds[collectives.rank() + 1]])
    return torch.cat(own)


def check_shared_weight(name: str, users: list[int]) -> list[list[int]]:
    """A weight that some ranks use twice in a forward; what was sent in each backward, before its end.

    In the first backward nobody knows of the second use, and its part comes when the first may be under way.
    """
    mask, rank = make_mask(), collectives.rank()
    gradient, sent = SparseGradient(mask, torch.device("cpu"), GradientOptions(bucket=16)), []
    for number in range(3):
        parts = parts_of(mask, number, rank)
        with watching() as sizes:
            backward(gradient, parts)
            if rank in users:
                gradient.add(name, parts[name])
            sent.append(len(sizes))
            gradient.finish()
        again = sum(parts_of(mask, number, r)[name] for r in users)
        bounds = gradient.layout.bounds[name]
        expected = own_sum_of(gradient, number)
        expected[gradient.own_slices[name]] += again[bounds[rank] : bounds[rank + 1]]
        assert torch.equal(gradient.pop(), expected), number
    return sent


def check_memory() -> tuple[int, int, int]:
    """Bytes of buckets alive at most in the first backward and later, of one bucket, and of the gradient."""
    shapes = {f"w{n}": (8, 16) for n in range(20)}
    index = {name: torch.arange(128, dtype=torch.int32) for name in shapes}
    gradient = SparseGradient(Mask(index, shapes), torch.device("cpu"), GradientOptions(bucket=128))
    most = []
    for _ in range(2):
        for name in reversed(shapes):
            gradient.add(name, torch.ones(128))
        gradient.finish()
        most.append(gradient.peak_buffer_bytes)
    assert most[0] == most[1]
    return most[0], 4 * 128, 4 * 128 * len(shapes)


def own_sum_of(gradient: SparseGradient, number: int) -> Tensor:
    own, rank = [], collectives.rank()
    for name in gradient.mask.shape:
        total = sum(parts_of(gradient.mask, number, r)[name] for r in range(collectives.world_size()))
        bounds = gradient.layout.bounds[name]
        own.append(total[bounds[rank] : bounds[rank + 1]])
    return torch.cat(own)


def check_another_forward() -> str:
    """A weight that is used more often than before is refused: its first part may be on its way."""
    mask, rank = make_mask(), collectives.rank()
    gradient = SparseGradient(mask, torch.device("cpu"), GradientOptions(bucket=16))
    backward(gradient, parts_of(mask, 0, rank))
    gradient.finish()
    backward(gradient, parts_of(mask, 1, rank))
    try:
        gradient.add("f", parts_of(mask, 1, rank)["f"])
    except UserError as error:
        gradient.finish()
        return str(error)
    return ""


def check_discard() -> None:
    """What was added is forgotten, between two backwards and in the middle of one that was not finished."""
    mask, rank = make_mask(), collectives.rank()
    gradient = SparseGradient(mask, torch.device("cpu"), GradientOptions(overlap=False))
    backward(gradient, parts_of(mask, 5, rank))
    gradient.clear()
    backward(gradient, parts_of(mask, 0, rank))
    gradient.finish()
    assert torch.equal(gradient.pop(), own_sum(gradient, 1))
