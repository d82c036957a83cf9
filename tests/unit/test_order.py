"""Which rows a step trains on: every row as often as it should, from any position."""

import hashlib
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.data.sampler import Sampler, epoch_shares


def randperm(num_rows, *parts):
    """The documented shuffle: its seed is of a SHA-256 over seed, purpose and epoch."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_row_once_an_epoch_and_epochs_follow_each_other():
    order = Sampler((12,), None, 0)
    ids = [number for step in range(10) for number in order.ids(step * 5, 5)]
    assert len(ids) == 50 and len(order) == 12
    for epoch in range(4):
        assert sorted(ids[epoch * 12 : (epoch + 1) * 12]) == list(range(12))
        assert ids[epoch * 12 : (epoch + 1) * 12] == randperm(12, 0, "order", epoch)
    assert ids[:12] != ids[12:24]
    assert order.ids(0, 5) != Sampler((12,), None, 1).ids(0, 5)
    assert order.ids(0, 12) != Sampler((12,), None, 0, "calibration").ids(0, 12)


def test_a_batch_may_be_larger_than_the_data():
    ids = Sampler((3,), None, 0).ids(0, 8)
    assert len(ids) == 8 and sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


mixtures = st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4)


@given(mixtures, st.booleans(), st.integers(0, 300), st.integers(0, 100))
def test_it_can_start_anywhere(sources, weighted, first, count):
    sizes, weights = zip(*sources, strict=True)
    order = Sampler(sizes, weights if weighted else None, 7)
    whole = order.ids(0, first + count)
    assert order.ids(first, count) == whole[first:]
    assert whole == Sampler(sizes, weights if weighted else None, 7).ids(0, first + count)
    assert all(0 <= number < sum(sizes) for number in whole)


def test_without_weights_an_epoch_has_every_row_of_every_source_once():
    order = Sampler((5, 1, 7), None, 3)
    assert len(order) == 13
    for epoch in range(3):
        assert sorted(order.ids(13 * epoch, 13)) == list(range(13))
    assert order.ids(0, 13) == randperm(13, 3, "order", 0)  # mixed, not one source after the other


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ((10, 10), (1, 1), [10, 10]),
        ((10, 90), (1, 1), [10, 10]),
        ((10, 90), (1, 3), [10, 30]),
        ((10, 20), (1, 3), [7, 20]),
        ((100, 100, 100), (0.7, 0.2, 0.1), [100, 29, 14]),
        ((3, 1000), (1, 0.001), [3, 1]),  # never none of a source
        ((1000, 10), (1000.0, 1.0), [1000, 1]),
        ((7,), (0.3,), [7]),
    ],
)
def test_weights_are_shares_of_an_epoch_and_the_scarcest_source_is_seen_whole(sizes, weights, shares):
    assert epoch_shares(sizes, weights) == shares
    order = Sampler(sizes, weights, 0)
    assert len(order) == sum(shares)
    edges = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    for epoch in range(4):
        ids = order.ids(epoch * len(order), len(order))
        seen = [sum(start <= i < stop for i in ids) for start, stop in pairwise(edges)]
        assert seen == shares
        whole = [n for n in range(len(sizes)) if shares[n] == sizes[n]]
        assert whole
        for n in whole:
            assert {i for i in ids if edges[n] <= i < edges[n + 1]} == set(range(edges[n], edges[n + 1]))


@given(mixtures)
def test_all_rows_of_a_source_are_seen_equally_often(sources):
    sizes, weights = zip(*sources, strict=True)
    order = Sampler(sizes, weights, 11)
    num_epochs = 9
    seen = Counter(order.ids(0, num_epochs * len(order)))
    first = 0
    for size, share in zip(sizes, order.shares, strict=True):
        counts = [seen[number] for number in range(first, first + size)]
        assert sum(counts) == num_epochs * share
        assert max(counts) - min(counts) <= 1
        first += size


def test_a_source_goes_on_where_the_epoch_before_stopped():
    order = Sampler((4, 10), (1, 1), 5)
    parts = [[i - 4 for i in order.ids(8 * epoch, 8) if i >= 4] for epoch in range(5)]
    laps = [randperm(10, 5, "order of source 1", lap) for lap in range(2)]
    expected = laps[0] + laps[1]
    assert [sorted(part) for part in parts] == [sorted(expected[4 * n : 4 * n + 4]) for n in range(5)]


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(7, None, 7), (None, 1, 4), (None, 2, 7), (None, 0.5, 2), (None, 0.01, 1)],
)
def test_steps_of_a_run(steps, epochs, expected):
    assert Sampler((10,), None, 0).num_steps(3, steps, epochs) == expected


def test_a_rounding_error_is_no_step():
    assert 1.1 * 100 > 110
    assert Sampler((100,), None, 0).num_steps(11, None, 1.1) == 10
