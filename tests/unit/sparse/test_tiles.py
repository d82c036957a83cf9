"""The arithmetic of blocks, rows and columns, for any shape and beyond 2^31 entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speft_ds.sparse.tiles import Tiles

GRANULARITIES = st.sampled_from(["element", "block", "row", "column"])
SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 20))
# Of 2^31 entries and more.
BIG_SHAPES = st.tuples(st.integers(2**15, 2**18), st.integers(2**16, 2**18))


def rectangles(shape, granularity, block_size) -> list[tuple[range, range]]:
    """The rows and columns of every tile, row by row of tiles."""
    rows, columns = shape
    height = {"element": 1, "block": block_size, "row": 1, "column": rows}[granularity]
    width = {"element": 1, "block": block_size, "row": columns, "column": 1}[granularity]
    return [
        (range(top, min(top + height, rows)), range(left, min(left + width, columns)))
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


@given(GRANULARITIES, st.integers(2, 25), SHAPES)
def test_tiles_are_the_rectangles_of_the_weight(granularity, block_size, shape):
    tiles = Tiles.of(granularity, block_size, shape)
    expected = [
        [row * shape[1] + column for row in rows for column in columns]
        for rows, columns in rectangles(shape, granularity, block_size)
    ]
    numbers = torch.arange(tiles.num_tiles)
    assert tiles.num_tiles == len(expected)
    assert tiles.sizes(numbers).tolist() == [len(tile) for tile in expected]
    assert tiles.largest == max(len(tile) for tile in expected)
    assert [tiles.entries(number[None]).tolist() for number in numbers] == expected
    owner = {index: number for number, tile in enumerate(expected) for index in tile}
    assert sorted(owner) == list(range(shape[0] * shape[1]))
    assert tiles.tile_of(torch.arange(len(owner))).tolist() == [owner[index] for index in range(len(owner))]


@given(GRANULARITIES, st.integers(2, 25), SHAPES, st.data())
def test_entries_of_several_tiles_are_sorted(granularity, block_size, shape, data):
    tiles = Tiles.of(granularity, block_size, shape)
    chosen = data.draw(st.lists(st.integers(0, tiles.num_tiles - 1), unique=True))
    together = tiles.entries(torch.tensor(chosen, dtype=torch.int32))
    one_by_one = [index for tile in chosen for index in tiles.entries(torch.tensor([tile])).tolist()]
    assert together.dtype == torch.int64 and together.tolist() == sorted(one_by_one)
    assert set(tiles.tile_of(together).tolist()) == set(chosen)
    assert tiles.are_full(together)
    if chosen and tiles.sizes(tiles.tile_of(together[:1])) > 1:
        assert not tiles.are_full(together[1:])


@settings(max_examples=40, deadline=None)
@given(GRANULARITIES, st.integers(2, 128), BIG_SHAPES, st.data())
def test_tiles_of_big_weights(granularity, block_size, shape, data):
    """Exact, where 32-bit integers or floats would not be."""
    rows, columns = shape
    height = {"element": 1, "block": block_size, "row": 1, "column": rows}[granularity]
    width = {"element": 1, "block": block_size, "row": columns, "column": 1}[granularity]
    per_row = -(-columns // width)
    tiles = Tiles.of(granularity, block_size, shape)
    last = rows * columns - 1
    drawn = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=8))
    index = [*drawn, 2**31 - 1, 2**31 - 2**16, last]
    expected = [i // columns // height * per_row + i % columns // width for i in index]
    found = tiles.tile_of(torch.tensor(index))
    assert found.tolist() == expected
    assert tiles.num_tiles == -(-rows // height) * per_row == expected[-1] + 1
    tops, lefts = [u // per_row * height for u in expected], [u % per_row * width for u in expected]
    heights = [min(height, rows - top) for top in tops]
    widths = [min(width, columns - left) for left in lefts]
    sizes = [high * wide for high, wide in zip(heights, widths, strict=True)]
    assert tiles.sizes(found).tolist() == sizes
    entries = tiles.entries(found[:1])
    first = tops[0] * columns + lefts[0]
    assert entries.numel() == sizes[0] and bool((entries.diff() > 0).all())
    assert entries[0] == first and entries[-1] == first + (heights[0] - 1) * columns + widths[0] - 1
    assert bool((tiles.tile_of(entries) == found[0]).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tile_numbers_of_either_width_reach_beyond_2_31(dtype):
    tiles = Tiles.of("block", 16, (2**16, 2**16))  # 2^24 blocks, of 2^32 entries
    last = torch.tensor([2**24 - 1], dtype=dtype)
    assert tiles.entries(last)[-1] == 2**32 - 1 and tiles.sizes(last).tolist() == [256]
