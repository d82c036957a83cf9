"""Differences of adapters against dense matrices."""

import math

import pytest
import torch

from speft_ds.adapter.diff import Difference, diff, diff_heads, total
from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError
from unit.adapter.matrices import SHAPES, UP, Q, flat, matrices, write


@pytest.fixture
def adapter(tmp_path):
    def make(name, dense, *arguments, **facts):
        return Adapter.open(write(tmp_path / name, dense, *arguments, **facts))

    return make


def two():
    """Matrices of two adapters that share some entries, of which some are equal."""
    a, b = matrices(0, 0.3), matrices(1, 0.3)
    b[Q] = torch.where(torch.arange(16) % 2 == 0, a[Q], b[Q])
    b[UP].zero_()
    return a, b


def by_hand(a, b):
    """The same counts and sums of two dense matrices."""
    a, b = a.double(), b.double()
    in_a, in_b = a != 0, b != 0
    both = in_a & in_b
    return {
        "only_a": int((in_a & ~in_b).sum()),
        "only_b": int((in_b & ~in_a).sum()),
        "equal": int((both & (a == b)).sum()),
        "differing": int((both & (a != b)).sum()),
        "opposite": int((both & (a.sign() != b.sign())).sum()),
        "squares_a": float((a**2).sum()),
        "squares_b": float((b**2).sum()),
        "squares_apart": float(((a - b) ** 2).sum()),
        "product": float((a * b).sum()),
    }


def check(got: Difference, a, b):
    for key, value in by_hand(a, b).items():
        assert math.isclose(getattr(got, key), value, rel_tol=1e-12, abs_tol=1e-12), key


def test_every_weight_and_all_together(adapter):
    a, b = two()
    found = diff(adapter("a", a), adapter("b", b))
    assert list(found) == list(SHAPES)
    for name, difference in found.items():
        check(difference, a[name], b[name])
    both, a, b = total(list(found.values())), flat(a), flat(b)
    check(both, a, b)
    assert both.equal and both.differing and both.opposite and both.only_a and both.only_b
    in_both, in_either = int(((a != 0) & (b != 0)).sum()), int(((a != 0) | (b != 0)).sum())
    assert both.jaccard == in_both / in_either
    assert math.isclose(both.cosine, float(torch.cosine_similarity(a.double(), b.double(), dim=0)))


def test_an_adapter_and_itself(adapter):
    a = adapter("a", matrices(0))
    same = total(list(diff(a, a).values()))
    assert (same.only_a, same.only_b, same.differing, same.squares_apart) == (0, 0, 0, 0.0)
    assert same.equal == a.num_entries and same.jaccard == 1.0 and math.isclose(same.cosine, 1.0)


def test_an_adapter_and_nothing(adapter):
    dense = matrices(0)
    alone = total(list(diff(adapter("a", dense), None).values()))
    check(alone, flat(dense), torch.zeros(()))
    assert alone.jaccard == 0.0 and alone.cosine is None


def test_heads(adapter):
    head = torch.arange(6.0).view(2, 3)
    a = adapter("a", matrices(0), {"score.weight": head})
    b = adapter("b", matrices(0), {"score.weight": head + 1})
    wide = adapter("wide", matrices(0), {"score.weight": torch.ones(2, 4)})
    plain = adapter("plain", matrices(0))
    assert diff_heads(a, a) == {"score.weight": "equal"}
    assert diff_heads(a, b) == {"score.weight": f"differs, norm {math.sqrt(6):.4g}"}
    assert diff_heads(a, wide) == {"score.weight": "of shape (2, 3) and (2, 4)"}
    assert diff_heads(plain, a) == {"score.weight": f"only in {a.folder}"} == diff_heads(a, None)
    assert diff_heads(plain, None) == {}


def test_adapters_of_two_bases_are_refused(adapter):
    with pytest.raises(UserError, match="different bases"):
        diff(
            adapter("a", matrices(0)),
            adapter("b", matrices(0), fingerprint="0" * 64, fingerprint_bfloat16="1"),
        )
