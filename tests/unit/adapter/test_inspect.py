"""The summary of an adapter, and the difference of two, against dense matrices."""

import math
from dataclasses import asdict

import pytest
import torch

from speft_ds.adapter.format import Adapter
from speft_ds.adapter.inspect import diff, diff_whole, inspect, mask_counts, total
from speft_ds.report.tables import density_table
from unit.adapter.samples import SHAPES, UP, UP1, Q, flat, matrices, refused, write


@pytest.fixture
def adapter(tmp_path):
    def make(name, dense, *arguments, **facts):
        return Adapter.open(write(tmp_path / name, dense, *arguments, **facts))

    return make


def test_norms_and_counts_of_every_weight(adapter):
    dense = matrices(0, 0.2)
    dense[UP1].zero_()
    opened = adapter("a", dense)
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
    found = inspect(adapter("a", dense), num_largest=7)
    every = [
        (float(values[row, column]), name, row, column)
        for name, values in dense.items()
        for row, column in values.nonzero().tolist()
    ]
    assert found.largest == sorted(every, key=lambda entry: -abs(entry[0]))[:7]


def check(got, a, b):
    """Compare a difference with the same counts and sums of two dense matrices."""
    a, b = a.double(), b.double()
    in_a, in_b = a != 0, b != 0
    both = in_a & in_b
    expected = {
        "only_a": int((in_a & ~in_b).sum()),
        "only_b": int((in_b & ~in_a).sum()),
        "equal": int((both & (a == b)).sum()),
        "differing": int((both & (a != b)).sum()),
        "opposite": int((both & (a.sign() != b.sign())).sum()),
        "squares_a": float((a**2).sum()),
        "squares_b": float((b**2).sum()),
        "squares_difference": float(((a - b) ** 2).sum()),
        "product": float((a * b).sum()),
    }
    assert asdict(got) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_every_weight_and_all_together(adapter):
    a, b = matrices(0, 0.3), matrices(1, 0.3)
    b[Q] = torch.where(torch.arange(16) % 2 == 0, a[Q], b[Q])
    b[UP].zero_()
    found = diff(adapter("a", a), adapter("b", b))
    assert list(found) == list(SHAPES)
    for name, difference in found.items():
        check(difference, a[name], b[name])
    together, a, b = total(found.values()), flat(a), flat(b)
    check(together, a, b)
    assert all(asdict(together).values())  # there are entries of each kind
    in_both, in_either = int(((a != 0) & (b != 0)).sum()), int(((a != 0) | (b != 0)).sum())
    assert together.jaccard == in_both / in_either
    assert together.cosine == pytest.approx(float(torch.cosine_similarity(a.double(), b.double(), dim=0)))


def test_an_adapter_itself_and_nothing(adapter):
    dense = matrices(0)
    a = adapter("a", dense)
    same = total(diff(a, a).values())
    check(same, flat(dense), flat(dense))
    assert same.jaccard == 1.0 and math.isclose(same.cosine, 1.0)
    alone = total(diff(a, None).values())
    check(alone, flat(dense), torch.zeros(flat(dense).shape))
    assert alone.jaccard == 0.0 and alone.cosine is None


def test_heads(adapter):
    head = torch.arange(6.0).view(2, 3)
    a = adapter("a", matrices(0), {"score.weight": head})
    b = adapter("b", matrices(0), {"score.weight": head + 1})
    wide = adapter("wide", matrices(0), {"score.weight": torch.ones(2, 4)})
    plain = adapter("plain", matrices(0))
    assert diff_whole(a, a) == {"score.weight": "equal"}
    assert f"{math.sqrt(6):.4g}" in diff_whole(a, b)["score.weight"]
    assert "(2, 4)" in diff_whole(a, wide)["score.weight"]
    assert str(a.folder) in diff_whole(plain, a)["score.weight"]
    assert diff_whole(plain, a) == diff_whole(a, None) and diff_whole(plain, None) == {}


def test_adapters_of_two_bases_are_refused(adapter):
    a, b = adapter("a", matrices(0)), adapter("b", matrices(0), fingerprint="0" * 64)
    refused(lambda: diff(a, b), f"{a.folder} and {b.folder}")
