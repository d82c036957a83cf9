"""The sparse gradient's way to its owners: exact sums, while the backward goes on, in little memory."""

import pytest

from distributed import gradient_checks as checks


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
        # The first backward tells how often each weight is used; from then on nothing waits for its end.
        assert seen["during"] == [0, *[seen["buckets"]] * 5]
        assert seen["buckets"] == {1: 5, 100: 3, 2**22: 1}[bucket]
        assert seen["most"] <= max(seen["bound"], seen["sent"])


def test_idle_weights(ranks):
    ranks(2)(checks.check_idle_weights)


def test_a_shared_weight(ranks):
    ranks(2)(checks.check_shared_weight)


def test_a_forward_unlike_the_first_is_refused(ranks):
    for message in ranks(2)(checks.check_another_forward):
        assert "f was used 2 times in one forward, 1 times before" in message
        assert "train.overlap=false" in message


def test_discard(ranks):
    ranks(2)(checks.check_discard)
