"""The sparse gradient's way to its owners: exact sums, while the backward goes on, in little memory."""

import pytest

from distributed import gradient_checks as checks
from speft_ds.sparse.gradient import IN_FLIGHT


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("bucket", [1, 100, 2**22])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sums_are_exact(ranks, world_size, bucket, overlap):
    for seen in ranks(world_size)(checks.check_sums, bucket=bucket, overlap=overlap):
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


def test_idle_weights(ranks):
    ranks(2)(checks.check_idle_weights)


@pytest.mark.parametrize("users", [[0, 1], [1]])
@pytest.mark.parametrize("name", ["a", "f"])
def test_a_shared_weight(ranks, name, users):
    """`f` is the first to be complete: all else is sent before it comes again; `a` is the last."""
    for rank, sent in enumerate(ranks(2)(checks.check_shared_weight, name=name, users=users)):
        later = 5 if rank in users else {"a": 4, "f": 0}[name]  # the others wait for a part that never comes
        assert sent == [5, later, later]


def test_few_buckets_are_alive_at_a_time(ranks):
    for most, bucket, gradient in ranks(2)(checks.check_memory):
        assert most == (IN_FLIGHT + 1) * bucket < gradient / 6


def test_a_forward_unlike_the_first_is_refused(ranks):
    for message in ranks(2)(checks.check_another_forward):
        assert "f was used 2 times in one forward, 1 times before" in message
        assert "train.overlap=false" in message


def test_discard(ranks):
    ranks(2)(checks.check_discard)
