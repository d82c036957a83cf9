"""Which rows a step trains on: every row as often as it should, from any position."""

import hashlib
import math
from collections import Counter
from itertools import accumulate, pairwise

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


def test_every_row_of_every_source_once_an_epoch_and_epochs_follow_each_other():
    sampler = Sampler((5, 1, 7), None, 3)
    ids = [number for step in range(10) for number in sampler.ids(step * 5, 5)]
    assert len(ids) == 50 and len(sampler) == 13
    for epoch in range(3):
        of_epoch = ids[epoch * 13 : (epoch + 1) * 13]
        assert sorted(of_epoch) == list(range(13))
        assert of_epoch == randperm(13, 3, "order", epoch)  # mixed, not one source after the other
    assert Sampler((13,), None, 0).epoch(1) == randperm(13, 0, "order", 1)
    assert Sampler((13,), None, 0, "calibration").epoch(0) == randperm(13, 0, "calibration", 0)


mixtures = st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4)
# Of each source the rows of its conversations, and its weight.
talks = st.lists(
    st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.floats(0.1, 10)),
    min_size=1,
    max_size=3,
)


def of_talks(sources, weighted, seed=7):
    groups, weights = zip(*sources, strict=True)
    edges = [*accumulate((rows for source in groups for rows in source), initial=0)]
    sizes = tuple(map(sum, groups))
    return Sampler(sizes, weights if weighted else None, seed, edges=edges), groups, edges


@given(talks, st.booleans(), st.integers(0, 300), st.integers(0, 100))
def test_it_can_start_anywhere(sources, weighted, first, count):
    sampler, _, edges = of_talks(sources, weighted)
    complete = sampler.ids(0, first + count)
    fresh = Sampler(sampler.sizes, sampler.weights, 7, edges=edges)  # which has seen no epoch so far
    assert fresh.ids(first, count) == complete[first:]
    assert all(0 <= number < edges[-1] for number in complete)
    epoch, row = fresh.locate(first)
    assert sum(len(fresh.epoch(number)) for number in range(epoch)) + row == first
    assert row < len(fresh.epoch(epoch)) and fresh.num_epochs(first) == epoch + row / len(fresh.epoch(epoch))


@given(talks, st.booleans())
def test_conversations_stay_together_and_weights_count_them(sources, weighted):
    sampler, groups, edges = of_talks(sources, weighted)
    single = Sampler(tuple(map(len, groups)), sampler.weights, 7)
    for epoch in range(3):  # as if each were one row
        expected = [row for talk in single.epoch(epoch) for row in range(*edges[talk : talk + 2])]
        assert sampler.epoch(epoch) == expected
    lengths = [len(sampler.epoch(epoch)) for epoch in range(3)]
    assert len(sampler) == lengths[0] and sampler.num_steps(4, None, 3.0) == math.ceil(sum(lengths) / 4)
    assert sampler.num_steps(1, None, 2.5) == math.ceil(sum(lengths[:2]) + lengths[2] / 2)


@given(talks)
def test_groups_count_as_much_as_is_in_them(sources):
    """As packs do, of several conversations each."""
    counts, weights = zip(*sources, strict=True)
    edges = range(sum(map(len, counts)) + 1)
    sizes, flat = tuple(map(len, counts)), [count for source in counts for count in source]
    sampler, num_epochs = Sampler(sizes, weights, 3, edges=edges, counts=flat), 12
    shares = epoch_shares([sum(source) for source in counts], weights)
    seen = Counter(row for epoch in range(num_epochs) for row in sampler.epoch(epoch))
    first = 0
    for source, share in zip(counts, shares, strict=True):
        rows = range(first, first + len(source))
        first += len(source)
        assert max(seen[row] for row in rows) - min(seen[row] for row in rows) <= 1
        taken = sum(seen[row] * flat[row] for row in rows)
        assert num_epochs * share <= taken < num_epochs * share + max(source)


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ((10, 10), (1, 1), [10, 10]),
        ((10, 90), (1, 3), [10, 30]),
        ((10, 20), (1, 3), [7, 20]),
        ((100, 100, 100), (0.7, 0.2, 0.1), [100, 29, 14]),
        ((3, 1000), (1, 0.001), [3, 1]),  # never none of a source
        ((1000, 10), (1000.0, 1.0), [1000, 1]),
        ((7,), (0.3,), [7]),
    ],
)
def test_weights_are_shares_of_an_epoch_and_the_scarcest_source_is_seen_completely(sizes, weights, shares):
    assert epoch_shares(sizes, weights) == shares
    sampler = Sampler(sizes, weights, 0)
    edges = [*pairwise(sum(sizes[:n]) for n in range(len(sizes) + 1))]
    for epoch in range(4):
        ids = sampler.epoch(epoch)
        parts = [sorted(i for i in ids if start <= i < stop) for start, stop in edges]
        assert [len(part) for part in parts] == shares and len(ids) == len(sampler) == sum(shares)
        assert any(part == list(range(*edge)) for part, edge in zip(parts, edges, strict=True))


@given(mixtures)
def test_all_rows_of_a_source_are_seen_equally_often(sources):
    sizes, weights = zip(*sources, strict=True)
    sampler = Sampler(sizes, weights, 11)
    num_epochs = 9
    seen = Counter(sampler.ids(0, num_epochs * len(sampler)))
    first = 0
    for size, share in zip(sizes, sampler.shares, strict=True):
        counts = [seen[number] for number in range(first, first + size)]
        assert sum(counts) == num_epochs * share
        assert max(counts) - min(counts) <= 1
        first += size


def test_a_source_goes_on_where_the_epoch_before_stopped():
    sampler = Sampler((4, 10), (1, 1), 5)
    parts = [[i - 4 for i in sampler.epoch(epoch) if i >= 4] for epoch in range(5)]
    laps = [randperm(10, 5, "order of source 1", lap) for lap in range(2)]
    expected = laps[0] + laps[1]
    assert [sorted(part) for part in parts] == [sorted(expected[4 * n : 4 * n + 4]) for n in range(5)]


@pytest.mark.parametrize(("epochs", "expected"), [(1, 4), (2, 7), (0.5, 2), (0.01, 1)])
def test_steps_of_a_run(epochs, expected):
    sampler = Sampler((10,), None, 0)
    assert sampler.num_steps(3, None, epochs) == expected and sampler.num_steps(3, 9, None) == 9
    assert 1.1 * 100 > 110 and Sampler((100,), None, 0).num_steps(11, None, 1.1) == 10  # no step by rounding
