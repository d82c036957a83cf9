"""The summary of an adapter against dense matrices."""

import math

import pytest
import torch

from speft_ds.adapter.format import Adapter
from speft_ds.adapter.inspect import inspect, mask_counts
from speft_ds.report.tables import density_table
from unit.adapter.samples import SHAPES, UP1, Q, flat, matrices, write


@pytest.fixture
def adapter(tmp_path):
    return lambda dense: Adapter.open(write(tmp_path / "adapter", dense))


def test_norms_and_counts_of_every_weight(adapter):
    dense = matrices(0, 0.2)
    dense[UP1].zero_()
    opened = adapter(dense)
    found, mask = inspect(opened), mask_counts(opened)
    squares = {name: float(values.double().square().sum()) for name, values in dense.items() if name != UP1}
    assert found.squares == pytest.approx(squares) and list(found.squares) == list(squares)
    assert math.isclose(found.norm, float(flat(dense).double().norm()))
    assert mask.density == int(flat(dense).count_nonzero()) / flat(dense).numel()
    layers, modules, cells = density_table(mask)
    assert (layers, modules) == (["0", "1"], ["self_attn.q_proj", "mlp.up_proj"])
    assert cells[1][1] == (0, 31 * 16) and cells[0][0] == (int(dense[Q].count_nonzero()), 24 * 16)


@pytest.mark.parametrize("kind", ["any", "equal", "one"])
def test_the_largest_changes(adapter, kind):
    dense = matrices(0, 0.5)
    if kind == "equal":  # they come in order
        dense = {name: values.sign() for name, values in dense.items()}
    elif kind == "one":
        dense = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        dense[UP1][3, 5] = -2.0
    found = inspect(adapter(dense), num_largest=7)
    every = [
        (name, row, column, float(values[row, column]))
        for name, values in dense.items()
        for row, column in values.nonzero().tolist()
    ]
    largest = sorted(every, key=lambda entry: -abs(entry[3]))[:7]
    assert [(c.weight, c.row, c.column, c.delta) for c in found.largest] == largest
