"""The k largest magnitudes of a stream, against a stable sort of all of it."""

import pytest
import torch

from speft_ds.adapter.largest import Largest


def taken(tensors, k):
    """[n] bool over the joined tensors, as the stream takes them."""
    largest = Largest.find(lambda: iter(tensors), k)
    chosen = [torch.zeros(len(values), dtype=torch.bool) for values in tensors]
    for mask, values in zip(chosen, tensors, strict=True):
        mask[largest.take(values)] = True
    return torch.cat(chosen)


def wanted(tensors, k):
    values = torch.cat(tensors).abs()
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:k]] = True
    return chosen


def stream(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5000, generator=generator)
    if kind == "ties":
        values = (values * 3).round()
    elif kind == "bfloat16":
        values = values.bfloat16().float()
    elif kind == "wide":
        values = values * 10 ** (torch.rand(5000, generator=generator) * 76 - 44)  # to denormals
    elif kind == "equal":
        values = values.sign()
    return values.split([1, 0, 2999, 1000, 1000])


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "wide", "equal"])
@pytest.mark.parametrize("k", [1, 2, 17, 1234, 4999, 5000])
def test_the_largest_are_taken_and_of_equal_ones_the_first(kind, k):
    tensors = stream(kind, k)
    assert torch.equal(taken(tensors, k), wanted(tensors, k))


def test_none_and_more_than_there_are():
    tensors = [torch.tensor([1.0, -0.0, 3.0]), torch.tensor([-2.0])]
    assert not taken(tensors, 0).any()
    assert taken(tensors, 9).all()


def test_large_tensors_are_taken_a_chunk_at_a_time():
    tensors = [torch.randn(2**17 + 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    assert torch.equal(taken(tensors, 2**17), wanted(tensors, 2**17))
