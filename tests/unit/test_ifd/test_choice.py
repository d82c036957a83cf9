"""Which rows are chosen by their IFD scores."""

import random

import pytest

from speft_ds.data.ifd import choose


@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_a_naive_sort(seed):
    draw = random.Random(seed)
    scores = [draw.choice([0.1, 0.5, 0.5, 0.9, draw.uniform(0, 2), 1.0, 1.5]) for _ in range(30)]
    for k in range(32):
        left, naive = dict(enumerate(scores)), []
        while left and len(naive) < k:
            best = min(left, key=lambda number: (-left[number], number))
            if left.pop(best) < 1:
                naive.append(best)
            # those of 1 or more come first and are passed over
        assert choose(scores, k) == sorted(naive)


def test_choice_leaves_out_rows_that_do_not_follow_from_their_prompt():
    assert choose([1.0, 0.2, 3.0, 0.9, 0.2], 2) == [1, 3]
    assert choose([1.0, 0.2, 3.0], 2) == [1]
    assert choose([1.0], 1) == [] and choose([], 3) == []
