"""What any number of ranks wrote, any number of ranks reads back: the same bits, at the same places."""

import json
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from speft_ds.sparse.layout import EntryTable
from speft_ds.training.checkpoint.folder import folder_of, inspect, publish, temporary_of, verify
from speft_ds.training.checkpoint.parts import Parts, Snapshot, write_part
from unit.saved import manifest_of, quick_disk

WORLDS = [1, 2, 3, 4, 5]
DTYPES = [torch.float32, torch.int32, torch.int64, torch.uint8, torch.bfloat16]


def span(numel, rank, world_size):
    """ZeRO-3's shard of a flat weight, stated anew: equal pieces, the last ones short or empty."""
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def random_bits(count, dtype, seed):
    """Any bits at all, NaNs with payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).tolist()


def flat(index, dtype=torch.int32):
    return torch.tensor(index, dtype=dtype)


class Whole:
    """A table before it is shared out.

    Attributes:
        numel: weight -> its elements; index: weight -> sorted indices; columns: name -> values in this order.
    """

    def __init__(self, weights, index_dtype=torch.int32, seed=0):
        self.numel = {f"w{number}": numel for number, (numel, _) in enumerate(weights)}
        self.index = {f"w{n}": flat(sorted(index), index_dtype) for n, (_, index) in enumerate(weights)}
        count = sum(index.numel() for index in self.index.values())
        self.columns = {str(d).removeprefix("torch."): random_bits(count, d, seed) for d in DTYPES}

    def spans(self, rank, world_size):
        return {name: span(numel, rank, world_size) for name, numel in self.numel.items()}

    def of(self, rank, world_size):
        """The table of one rank, found entry by entry."""
        index, positions, first = {}, [], 0
        for name, (start, stop) in self.spans(rank, world_size).items():
            found = [p for p, value in enumerate(self.index[name].tolist()) if start <= value < stop]
            index[name] = self.index[name][found]
            positions += [first + p for p in found]
            first += self.index[name].numel()
        return EntryTable(index, {name: values[positions] for name, values in self.columns.items()})


@st.composite
def wholes(draw):
    """Up to five weights of up to 40 elements; some without entries, some shorter than the ranks are many."""
    weights = []
    for _ in range(draw(st.integers(1, 5))):
        numel = draw(st.integers(1, 40))
        weights.append((numel, draw(st.sets(st.integers(0, numel - 1)))))
    return Whole(weights, draw(st.sampled_from([torch.int32, torch.int64])), draw(st.integers(0, 99)))


def written(run, world_size, tables=lambda rank: {}, shared=None, own=lambda rank: {}, facts=None):
    """A checkpoint, made the way a run makes it. `tables`, `own`: rank -> what the rank has."""
    folder, lines, facts = folder_of(run, 10), [], facts or {}
    temporary_of(folder).mkdir(parents=True)
    with quick_disk():
        for rank in range(world_size):
            tensors = Snapshot(tables(rank), shared or {}, own(rank), facts).tensors(rank, world_size)
            lines.append(write_part(temporary_of(folder), rank, *tensors))
        publish(temporary_of(folder), folder, manifest_of(10, lines) | {"state": facts})
    checkpoint = inspect(folder)
    assert checkpoint.problem is None and verify(checkpoint) is None
    return Parts(checkpoint)


def assert_same(found, expected):
    assert list(found.index) == list(expected.index)
    assert [bits(index) for index in found.index.values()] == [bits(i) for i in expected.index.values()]
    assert {name: bits(column) for name, column in found.columns.items()} == {
        name: bits(column) for name, column in expected.columns.items()
    }


@pytest.mark.parametrize("written_by", WORLDS)
@given(wholes())
@settings(max_examples=15, deadline=None)
def test_any_number_of_ranks_reads_what_any_number_wrote(written_by, whole):
    with TemporaryDirectory() as folder:
        parts = written(Path(folder), written_by, lambda rank: {"t": whole.of(rank, written_by)})
        index = parts.index("t")
        assert {n: bits(i) for n, i in index.items()} == {n: bits(i) for n, i in whole.index.items()}
        for read_by in WORLDS:
            pieces = [parts.table("t", whole.spans(rank, read_by)) for rank in range(read_by)]
            for rank, piece in enumerate(pieces):
                assert_same(piece, whole.of(rank, read_by))
            for name, expected in whole.index.items():
                assert torch.equal(torch.cat([piece.index[name] for piece in pieces]), expected)


@pytest.mark.parametrize("written_by", WORLDS)
def test_tables_do_not_mix(tmp_path, written_by):
    trained, dropped = Whole([(7, {0, 3, 6}), (5, {1})]), Whole([(7, {1, 2}), (5, set())], seed=1)
    tables = {"trained": trained, "dropped": dropped}
    parts = written(tmp_path, written_by, lambda rank: {n: t.of(rank, written_by) for n, t in tables.items()})
    assert parts.has("trained") and parts.has("dropped") and not parts.has("first")
    for name, whole in tables.items():
        assert_same(parts.table(name, whole.spans(0, 1)), whole.of(0, 1))


def test_a_table_without_columns_is_an_index(tmp_path):
    whole = Whole([(9, {2, 8}), (3, set())])
    parts = written(tmp_path, 2, lambda rank: {"first": EntryTable(whole.of(rank, 2).index)})
    assert {name: i.tolist() for name, i in parts.index("first").items()} == {"w0": [2, 8], "w1": []}
    table = parts.table("first", whole.spans(1, 2))
    assert table.columns == {} and [i.tolist() for i in table.index.values()] == [[8], []]


def test_indices_beyond_32_bits_beside_short_weights(tmp_path):
    large = [2**31 - 1, 2**31, 2**36]
    index = {"short": flat([0, 4]), "long": flat(large, torch.int64), "empty": flat([])}
    values = torch.arange(5, dtype=torch.float32)
    parts = written(tmp_path, 1, lambda rank: {"t": EntryTable(index, {"delta": values})})
    assert [i.tolist() for i in parts.index("t").values()] == [[0, 4], large, []]
    table = parts.table("t", {"short": (3, 5), "long": (2**31, 2**40), "empty": (0, 1)})
    assert [i.tolist() for i in table.index.values()] == [[4], large[1:], []]
    assert table.columns["delta"].tolist() == [1.0, 3.0, 4.0]


def test_weights_are_read_in_the_order_of_the_reader(tmp_path):
    """A run that starts anew builds its weights in an order of its own."""
    whole = Whole([(6, {0, 5}), (6, {2}), (6, {1, 3})])
    parts = written(tmp_path, 3, lambda rank: {"t": whole.of(rank, 3)})
    found = parts.table("t", {"w2": (0, 6), "w0": (0, 6), "w1": (0, 6)})
    assert {name: i.tolist() for name, i in found.index.items()} == {"w2": [1, 3], "w0": [0, 5], "w1": [2]}
    assert list(found.index) == ["w2", "w0", "w1"]
    order = torch.tensor([3, 4, 0, 1, 2])
    assert {n: bits(c) for n, c in found.columns.items()} == {
        name: bits(column[order]) for name, column in whole.columns.items()
    }


@pytest.mark.parametrize("written_by", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_all_ranks_held_is_put_together_again(tmp_path, written_by, dtype):
    held = {f"of {size}": random_bits(size, dtype, size) for size in (0, 1, 3, 7, 20)}
    parts = written(tmp_path, written_by, shared=held)
    assert {name: bits(parts.shared(name)) for name in held} == {name: bits(t) for name, t in held.items()}
    sizes = []  # each rank writes its share, and no more
    for path in parts.paths:
        with safe_open(path, framework="pt") as file:
            sizes.append(file.get_tensor("shared.of 20").numel())
    assert sum(sizes) == 20 and max(sizes) - min(sizes) <= 1


def test_a_rank_finds_what_it_wrote_for_itself_and_the_facts(tmp_path):
    facts = {"sha256": "ab", "changes": [{"step": 3, "dropped": 1}], "num_selections": 2}

    def own(rank):
        return {str(dtype): random_bits(rank + 2, dtype, rank) for dtype in DTYPES}

    parts = written(tmp_path, 3, shared={"own": flat([5])}, own=own, facts=facts)
    for rank in range(3):
        found = parts.own(rank)
        assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in own(rank).items()}
    assert parts.facts == facts


def test_nothing_is_in_a_part_but_what_was_declared(tmp_path):
    """No base weight: of each weight as many values as entries, and those of this rank alone."""
    whole = Whole([(1000, {1, 500, 999}), (1000, set())])

    def tables(rank):
        return {"trained": whole.of(rank, 2)}

    own = {"random_cpu": torch.zeros(8, dtype=torch.uint8)}
    parts = written(tmp_path, 2, tables, {"statistics": torch.zeros(6)}, lambda rank: own)
    declared = {f"trained.{name}" for name in ["index", *whole.columns]}
    for rank, path in enumerate(parts.paths):
        num_own = sum(index.numel() for index in whole.of(rank, 2).index.values())
        with safe_open(path, framework="pt") as file:
            sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        expected = dict.fromkeys(declared, num_own) | {"shared.statistics": 3, "own.random_cpu": 8}
        assert sizes == expected
        assert metadata.keys() == {"tables"}
        counts = {"w0": num_own, "w1": 0}
        assert json.loads(metadata["tables"]) == {"trained": counts}
    names = {path.name for path in parts.paths[0].parent.iterdir()}
    assert names == {"COMPLETE", "manifest.json", "part_00000.safetensors", "part_00001.safetensors"}


def test_a_snapshot_is_a_copy(tmp_path):
    """Training goes on while it is written."""
    delta, statistics, random = torch.zeros(2), torch.zeros(4), torch.zeros(3, dtype=torch.uint8)
    index = flat([0, 1])
    snapshot = Snapshot(
        {"t": EntryTable({"w": index}, {"delta": delta})}, {"s": statistics}, {"r": random}, {}
    )
    tensors, _ = snapshot.tensors(0, 1)
    for tensor in (delta, statistics, random, index):
        tensor += 7
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "t.index": [0, 1],
        "t.delta": [0.0, 0.0],
        "shared.s": [0.0] * 4,
        "own.r": [0] * 3,
    }
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors.values())


@pytest.mark.parametrize("world_size", [*WORLDS, 8])
def test_the_shards_of_this_file_are_those_of_the_package(world_size):
    from speft_ds.zero.shards import shard_range

    for numel in range(1, 41):
        spans = [span(numel, rank, world_size) for rank in range(world_size)]
        assert spans == [shard_range(numel, rank, world_size) for rank in range(world_size)]
        assert all(a[1] == b[0] for a, b in pairwise(spans)) and spans[-1][1] == numel
