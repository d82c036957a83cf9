"""The sparse gradient's way to its owners: exact sums, while the backward goes on, in little memory.

The checks, which run on every rank, come first. A backward adds small whole numbers, whose sums are exact.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.sparse.gradient import IN_FLIGHT, GradientOptions, SparseGradient
from speft_ds.sparse.mask import Mask

SHAPES = {"a": (7, 5), "b": (16, 16), "c": (1, 1), "d": (33, 8), "e": (4, 4), "f": (64, 32)}
Uses = dict[tuple[str, int], int]  # (weight, rank) -> how often it is used in a forward; else 1


def make_gradient(density: float = 0.3, **options) -> SparseGradient:
    """Of a mask with entries of every weight but `e`, which has none."""
    generator, index = torch.Generator().manual_seed(1), {}
    for name, (rows, columns) in SHAPES.items():
        count = 0 if name == "e" else max(1, round(density * rows * columns))
        chosen = torch.randperm(rows * columns, generator=generator)[:count]
        index[name] = chosen.sort().values.to(torch.int32)
    return SparseGradient(Mask(index, dict(SHAPES)), collectives.device(), GradientOptions(**options))


def parts_of(mask: Mask, number: int, rank: int) -> dict[str, Tensor]:
    """What a rank's backward of the micro-batch `number` adds, once."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    parts = {n: torch.randint(-8, 9, (i.numel(),), generator=generator) for n, i in mask.index.items()}
    return {name: part.float().to(collectives.device()) for name, part in parts.items()}


def backward(gradient: SparseGradient, number: int, uses: Uses) -> None:
    """Add this rank's parts in the order of a backward, the last weight first, then those used twice."""
    rank = collectives.rank()
    parts = parts_of(gradient.mask, number, rank)
    for time in (1, 2):
        for name in reversed(parts):
            if parts[name].numel() and time <= uses.get((name, rank), 1):
                gradient.add(name, parts[name])


def own_sum(gradient: SparseGradient, numbers: Iterable[int], uses: Uses) -> Tensor:
    """The sum over ranks and micro-batches of what this rank owns, by plain indexing."""
    own, own_rank = [], collectives.rank()
    for name in gradient.mask.shape:
        total = torch.zeros(gradient.mask.index[name].numel(), device=collectives.device())
        for number, rank in product(numbers, range(collectives.world_size())):
            total += uses.get((name, rank), 1) * parts_of(gradient.mask, number, rank)[name]
        bounds = gradient.layout.bounds[name]
        own.append(total[bounds[own_rank] : bounds[own_rank + 1]])
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
    gradient = make_gradient(bucket=bucket, overlap=overlap)
    during = []
    for _ in range(2):  # twice the same step
        for number in range(3):
            with watching() as sizes:
                backward(gradient, number, {})
                during.append(len(sizes))
                gradient.finish()
        assert torch.equal(gradient.own, own_sum(gradient, range(3), {})), "another sum"
        gradient.clear()
        assert not gradient.own.any(), "something is left"
    largest = max((4 * len(bucket.starts) * max(bucket.lengths) for bucket in gradient.buckets), default=0)
    return {
        "buckets": len(gradient.buckets),
        "during": during,
        "most": gradient.peak_buffer_bytes,
        "bound": (IN_FLIGHT + 1) * largest,  # on their way, and one that is filled
        "sent": sum(sizes),
        "least": 4 * gradient.mask.num_trainable,
    }


def check_uses(uses: list[Uses]) -> list[int]:
    """Weights that some ranks use twice in a forward, or not at all; what was sent before the end of each.

    In the first backward nobody knows of a second use, and its part comes when the first may be under way.
    """
    gradient, sent = make_gradient(bucket=16), []
    for number, in_this in enumerate(uses):
        with watching() as sizes:
            backward(gradient, number, in_this)
            sent.append(len(sizes))
            gradient.finish()
        assert torch.equal(gradient.own, own_sum(gradient, [number], in_this)), number
        gradient.clear()
    return sent


def check_memory() -> tuple[int, int, int]:
    """Bytes of buckets alive at most in the first backward and later, of one bucket, and of the gradient."""
    shapes = {f"w{n}": (8, 16) for n in range(20)}
    index = {name: torch.arange(128, dtype=torch.int32) for name in shapes}
    device = collectives.device()
    gradient = SparseGradient(Mask(index, shapes), device, GradientOptions(bucket=128))
    most = []
    for _ in range(2):
        for name in reversed(shapes):
            gradient.add(name, torch.ones(128, device=device))
        gradient.finish()
        most.append(gradient.peak_buffer_bytes)
    assert most[0] == most[1], most
    return most[0], 4 * 128, 4 * 128 * len(shapes)


def check_another_forward() -> str:
    """A weight that is used more often than before is refused: its first part may be on its way."""
    gradient = make_gradient(bucket=16)
    backward(gradient, 0, {})
    gradient.finish()
    backward(gradient, 1, {})
    try:
        gradient.add("f", parts_of(gradient.mask, 1, collectives.rank())["f"])
    except UserError as error:
        gradient.finish()
        return str(error)
    return ""


def check_discard() -> None:
    """What was added is forgotten, between two backwards and in the middle of one that was not finished."""
    gradient = make_gradient(overlap=False)
    backward(gradient, 5, {})
    gradient.clear()
    backward(gradient, 0, {})
    gradient.finish()
    assert torch.equal(gradient.own, own_sum(gradient, [0], {})), "another sum"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bucket", [1, 100, 2**22])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sums_are_exact(ranks, world_size, bucket, overlap):
    for seen in ranks(world_size)(check_sums, bucket=bucket, overlap=overlap):
        if world_size == 1:
            assert seen["most"] == seen["sent"] == 0
            continue
        assert seen["least"] <= seen["sent"] <= 1.1 * seen["least"] + 4 * 5 * world_size
        if not overlap:
            assert seen["during"] == [0] * 6
            continue
        assert seen["during"] == [seen["buckets"]] * 6  # nothing waits for the end of a backward
        assert seen["buckets"] == {1: 5, 100: 3, 2**22: 1}[bucket]
        assert seen["most"] <= seen["bound"]


def test_a_weight_that_one_rank_does_not_use(ranks):
    """As an expert without tokens."""
    ranks(2)(check_uses, uses=[{(name, number % 2): 0 for name in "bd"} for number in range(3)])


@pytest.mark.parametrize("users", [[0, 1], [1]])
@pytest.mark.parametrize("name", ["a", "f"])
def test_a_shared_weight(ranks, name, users):
    """`f` is the first to be complete: all else is sent before it comes again; `a` is the last."""
    twice = {(name, rank): 2 for rank in users}
    for rank, sent in enumerate(ranks(2)(check_uses, uses=[twice] * 3)):
        later = 5 if rank in users else {"a": 4, "f": 0}[name]  # the others wait for a part that never comes
        assert sent == [5, later, later]


def test_few_buckets_are_alive_at_a_time(ranks):
    for most, bucket, gradient in ranks(2)(check_memory):
        assert most == (IN_FLIGHT + 1) * bucket < gradient / 6


def test_a_forward_unlike_the_first_is_refused(ranks):
    for message in ranks(2)(check_another_forward):
        assert "f was used 2 times in one forward, 1 times before" in message
        assert "train.overlap=false" in message


def test_discard(ranks):
    ranks(2)(check_discard)
