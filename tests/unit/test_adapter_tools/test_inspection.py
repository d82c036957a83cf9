"""What is said of an adapter, against dense matrices."""

import math

import pytest
import torch

from speft_ds.adapter.format import Adapter
from speft_ds.adapter.inspection import counts, inspect
from speft_ds.report.tables import density_table
from unit.test_adapter_tools.made import SHAPES, UP1, flat, matrices, write


@pytest.fixture
def adapter(tmp_path):
    return lambda dense: Adapter.open(write(tmp_path / "adapter", dense))


def test_counts_and_norms_of_every_weight(adapter):
    dense = matrices(0, 0.2)
    dense[UP1].zero_()
    seen = inspect(adapter(dense))
    assert list(seen.weights) == [name for name in SHAPES if name != UP1]
    for name, weight in seen.weights.items():
        assert weight.count == int(dense[name].count_nonzero())
        assert math.isclose(weight.squares, float(dense[name].double().square().sum()))
        assert weight.largest == float(dense[name].abs().max())
    assert math.isclose(seen.norm, float(flat(dense).double().norm()))
    assert seen.num_entries == int(flat(dense).count_nonzero())
    assert seen.largest == float(flat(dense).abs().max())


@pytest.mark.parametrize("coarse", [False, True])
def test_the_largest_changes(adapter, coarse):
    dense = matrices(0, 0.5)
    if coarse:  # many are equal: they come in order
        dense = {name: values.sign() for name, values in dense.items()}
    seen = inspect(adapter(dense), num_largest=7)
    every = [
        (name, row, column, float(dense[name][row, column]))
        for name, (rows, columns) in SHAPES.items()
        for row in range(rows)
        for column in range(columns)
        if dense[name][row, column]
    ]
    largest = sorted(every, key=lambda entry: -abs(entry[3]))[:7]
    assert [(c.weight, c.row, c.column, c.delta) for c in seen.changes] == largest


def test_counts_are_those_of_the_mask(adapter):
    dense = matrices(0, 0.2)
    dense[UP1].zero_()
    mask = counts(adapter(dense))
    assert mask.density == int(flat(dense).count_nonzero()) / flat(dense).numel()
    layers, modules, cells = density_table(mask)
    assert (layers, modules) == (["0", "1"], ["self_attn.q_proj", "mlp.up_proj"])
    assert cells[1][1] == (0, 31 * 16)
    assert cells[0][0] == (int(dense[next(iter(SHAPES))].count_nonzero()), 24 * 16)


def test_fewer_entries_than_asked_for(adapter):
    dense = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dense[UP1][3, 5] = -2.0
    (change,) = inspect(adapter(dense)).changes
    assert (change.weight, change.row, change.column, change.delta) == (UP1, 3, 5, -2.0)
