"""Packs of rows, against a first fit that tries every open pack."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.data.dataset import Row, pack
from speft_ds.data.packing import first_fit


def naive(lengths, capacity):
    packs, room = [], []
    for number, length in enumerate(lengths):
        for pack_number in range(len(packs)):
            if room[pack_number] >= length:
                break
        else:
            pack_number = len(packs)
            packs.append([])
            room.append(capacity)
        packs[pack_number].append(number)
        room[pack_number] -= length
    return packs


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=60), st.just(n))))
def test_each_row_goes_into_the_first_pack_with_room(case):
    lengths, capacity = case
    packs = first_fit(lengths, capacity)
    assert packs == naive(lengths, capacity)
    assert sorted(number for numbers in packs for number in numbers) == list(range(len(lengths)))
    assert all(numbers and sum(lengths[n] for n in numbers) <= capacity for numbers in packs)


def test_many_rows():
    draw = random.Random(0)
    lengths = [min(1024, 1 + int(draw.expovariate(1 / 200))) for _ in range(50_000)]
    packs = first_fit(lengths, 1024)
    assert sorted(number for numbers in packs for number in numbers) == list(range(50_000))
    assert all(sum(lengths[n] for n in numbers) <= 1024 for numbers in packs)
    assert sum(lengths) / (1024 * len(packs)) > 0.97
    assert packs == first_fit(lengths, 1024)


def test_no_rows_and_rows_that_do_not_fit():
    assert first_fit([], 8) == []
    assert first_fit([8, 8], 8) == [[0], [1]]
    with pytest.raises(ValueError, match="item 1 of length 9 does not fit a pack of 8"):
        first_fit([1, 9], 8)


def test_a_pack_says_where_its_rows_begin():
    rows = [Row([5, 6, 7], [(1, 3)]), Row([8], []), Row([9, 10, 11, 12], [(1, 2), (3, 4)])]
    packed = pack(rows)
    assert packed.ids == [5, 6, 7, 8, 9, 10, 11, 12]
    assert packed.starts == [0, 3, 4]
    assert packed.spans == [(1, 3), (5, 6), (7, 8)]
    assert packed.num_labels == sum(row.num_labels for row in rows) == 4
    assert pack(rows[:1]) == rows[0]
