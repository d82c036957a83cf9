"""Every rank's deltas, joined in the order of the global index."""

import pytest
import torch

from speft_ds.adapter.save import join_shards
from speft_ds.sparse.layout import Layout
from speft_ds.zero.shards import shard_range


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shards_of_all_ranks_are_joined(world_size):
    generator = torch.Generator().manual_seed(0)
    numel = {"a": 35, "b": 4, "c": 1000, "none": 9}
    index = {
        name: (torch.rand(size, generator=generator) < 0.3).nonzero().view(-1) for name, size in numel.items()
    }
    index["none"] = index["none"][:0]
    delta = {name: torch.randn(len(positions), generator=generator) for name, positions in index.items()}
    by_rank = []
    for rank in range(world_size):
        own = []
        for name, positions in index.items():
            start, stop = shard_range(numel[name], rank, world_size)
            own.append(delta[name][(positions >= start) & (positions < stop)])
        by_rank.append(torch.cat(own))
    found = list(join_shards(index, Layout.of(index, numel, world_size), by_rank))
    assert [name for name, _, _ in found] == list(numel)
    for name, positions, deltas in found:
        assert torch.equal(positions, index[name]) and torch.equal(deltas, delta[name])
