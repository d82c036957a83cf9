"""The index arithmetic, for any size and any world size, also beyond 2^31."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speft_ds.sparse.layout import Layout, RankShards, index_dtype, locate
from speft_ds.zero.shards import shard_numel, shard_range

WORLDS = st.integers(1, 70)


@given(st.integers(1, 10_000), WORLDS)
def test_shards_tile_the_weight(numel, world_size):
    ranges = [shard_range(numel, rank, world_size) for rank in range(world_size)]
    covered = [index for start, stop in ranges for index in range(start, stop)]
    assert covered == list(range(numel))
    assert shard_numel(numel, world_size) * world_size - numel < world_size


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6), WORLDS)
def test_layout_slices_tile_every_ranks_buffers(weights, world_size):
    numel = {f"w{i}": size for i, (size, _) in enumerate(weights)}
    index = {
        f"w{i}": torch.randperm(size)[: min(size, count)].sort().values.int()
        for i, (size, count) in enumerate(weights)
    }
    layout = Layout.of(index, numel, world_size)
    assert sum(layout.lengths) == sum(positions.numel() for positions in index.values())
    for rank in range(world_size):
        end = 0
        for name in index:
            own = layout.places(name, rank)
            assert own.start == end
            end = own.stop
        assert end == layout.lengths[rank]


@given(st.integers(1, 2**36), WORLDS, st.data())
def test_local_indices_count_from_the_start_of_the_shard(numel, world_size, data):
    values = sorted(data.draw(st.sets(st.integers(0, numel - 1), max_size=30)) | {numel - 1})
    index = torch.tensor(values, dtype=index_dtype(numel))
    layout = Layout.of({"w": index}, {"w": numel}, world_size)
    size = -(-numel // world_size)
    for rank in range(world_size):
        expected = [value - rank * size for value in values if rank * size <= value < (rank + 1) * size]
        shards = RankShards({"w": numel}, rank, world_size)
        own = shards.select({"w": index})
        found = shards.to_local(own)["w"]
        assert torch.equal(own["w"], index[layout.bounds["w"][rank] : layout.bounds["w"][rank + 1]])
        assert found.dtype == index.dtype and found.tolist() == expected
        assert layout.counts("w")[rank] == layout.lengths[rank] == len(expected)


@given(st.sets(st.integers(0, 2**40), max_size=30), st.lists(st.integers(0, 2**40), max_size=10), st.data())
def test_locate_finds_what_is_there(keys, others, data):
    keys = sorted(keys)
    wanted = others + (data.draw(st.lists(st.sampled_from(keys), max_size=10)) if keys else [])
    wanted += [key + 1 for key in keys[-2:]]  # next to a key, and beyond the last
    position, found = locate(torch.tensor(keys, dtype=torch.int64), torch.tensor(wanted, dtype=torch.int64))
    assert position.shape == found.shape == (len(wanted),)
    assert found.tolist() == [key in keys for key in wanted]
    for key, place, there in zip(wanted, position.tolist(), found.tolist(), strict=True):
        assert not there or keys[place] == key


@pytest.mark.parametrize(("numel", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_index_dtype_holds_the_largest_index(numel, dtype):
    assert index_dtype(numel) == dtype
    assert torch.tensor([numel - 1], dtype=dtype).item() == numel - 1
