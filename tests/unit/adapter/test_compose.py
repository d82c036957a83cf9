"""Composed adapters against sums of dense matrices."""

import pytest
import torch

from speft_ds.adapter.compose import compose
from speft_ds.adapter.format import Adapter
from speft_ds.errors import UserError
from unit.adapter.matrices import SHAPES, UP1, Q, flat, matrices, read, write


@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.7, -1.3], [1.0, 1.0, 1.0], [0.1, 2.0, 3.0]])
def test_a_composed_adapter_is_the_weighted_sum(tmp_path, weights):
    parts = [matrices(seed, 0.3) for seed in range(len(weights))]
    folders = [write(tmp_path / str(seed), part) for seed, part in enumerate(parts)]
    met = compose(folders, tmp_path / "sum", weights)
    got = read(tmp_path / "sum")
    for name in SHAPES:
        expected = torch.zeros(SHAPES[name])
        for part, weight in zip(parts, weights, strict=True):
            expected = expected + part[name] * weight  # fp32, in this order
        assert torch.equal(got[name], expected), name
    values = torch.stack([flat(part) * weight for part, weight in zip(parts, weights, strict=True)])
    assert met.num_entries == int((values != 0).any(0).sum()) == Adapter.open(tmp_path / "sum").num_entries
    assert met.num_shared == int(((values != 0).sum(0) > 1).sum()) > 0
    assert met.num_opposite == int(((values > 0).any(0) & (values < 0).any(0)).sum()) > 0


def test_all_entries_stay_even_those_that_cancel(tmp_path):
    part = matrices(0)
    folders = [write(tmp_path / "a", part), write(tmp_path / "b", part)]
    met = compose(folders, tmp_path / "none", [1.0, -1.0])
    adapter = Adapter.open(tmp_path / "none")
    assert adapter.num_entries == Adapter.open(folders[0]).num_entries == met.num_shared == met.num_opposite
    assert all(not adapter.entries(name)[1].any() for name in adapter.names)


def test_weights_that_one_alone_has_and_the_facts(tmp_path):
    a, b = matrices(0), matrices(1)
    a[UP1].zero_()
    del b[Q]
    folders = [write(tmp_path / "a", a), write(tmp_path / "b", b)]
    compose(folders, tmp_path / "sum")
    got, adapter = read(tmp_path / "sum"), Adapter.open(tmp_path / "sum")
    assert torch.equal(got[Q], a[Q]) and torch.equal(got[UP1], b[UP1])
    facts = adapter.facts
    assert facts["mask"]["num_target_elements"] == sum(x * y for x, y in SHAPES.values())
    assert facts["mask"]["per_layer"] == {n: int((got[n] != 0).sum()) for n in facts["shapes"]}
    assert facts["mask"]["density"] == adapter.num_entries / facts["mask"]["num_target_elements"]
    assert facts["base"] == "owner/name" and "recipe" not in facts
    step = facts["history"][0]
    hashes = [Adapter.open(folder).facts["tensors_sha256"] for folder in folders]
    assert (step["command"], step["weights"]) == ("compose", [1.0, 1.0])
    assert [source["tensors_sha256"] for source in step["of"]] == hashes
    assert "compose weights=[1.0, 1.0] of a, b" in (tmp_path / "sum" / "README.md").read_text()


def test_a_head_is_kept(tmp_path):
    head, classes = torch.randn(3, 16), {"classes": ["a", "b", "c"], "pad_token_id": 2}
    classifier = {"task": "sequence_classification", **classes}
    plain = write(tmp_path / "plain", matrices(0))
    other = write(tmp_path / "head", matrices(1), {"score.weight": head}, **classifier)
    compose([plain, other], tmp_path / "sum", [1.0, 0.5])
    adapter = Adapter.open(tmp_path / "sum")
    assert torch.equal(adapter.head("score.weight"), head)
    assert all(adapter.facts[key] == value for key, value in classifier.items())


def refuse(tmp_path, folders, weights, *messages):
    with pytest.raises(UserError) as caught:
        compose(folders, tmp_path / "sum", weights)
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert not (tmp_path / "sum").exists()


def test_what_does_not_fit_is_refused(tmp_path):
    a = write(tmp_path / "a", matrices(0))
    refuse(tmp_path, [a], None, "nothing to be composed with")
    refuse(tmp_path, [a, a], [1.0], "2 adapters and 1 weights", "--weights 1.0,0.5")
    refuse(tmp_path, [a, a], [1.0, float("nan")], "finite")
    refuse(tmp_path, [a, a], [1e39, 1.0], "not finite")  # the deltas overflow
    refuse(tmp_path, [a, tmp_path], None, "there is no adapter", str(tmp_path))
    other = write(tmp_path / "other", matrices(1), fingerprint="0" * 64, fingerprint_bfloat16="1" * 64)
    refuse(tmp_path, [a, other], None, "different bases", str(a), str(other))
    half = write(tmp_path / "half", matrices(1), fingerprint="0" * 64, dtype="bfloat16")
    refuse(tmp_path, [a, half], None, "different dtypes", "float32 and bfloat16")
    shaped = write(tmp_path / "shaped", matrices(1, shapes=SHAPES | {Q: [16, 24]}))
    refuse(tmp_path, [a, shaped], None, "(24, 16)", "(16, 24)")
    heads = [write(tmp_path / f"h{n}", matrices(n), {"score.weight": torch.ones(2, 2)}) for n in range(2)]
    refuse(tmp_path, heads, None, "heads cannot be added")


def test_the_folder_one_is_in(tmp_path, monkeypatch):
    a = write(tmp_path / "a", matrices(0))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    compose([a, a], ".")
    assert Adapter.open(tmp_path / "empty").num_entries


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    a = write(tmp_path / "a", matrices(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for output in (tmp_path / "full", a, tmp_path / "full" / "thesis.tex"):
        before = sorted(output.parent.rglob("*"))
        with pytest.raises(UserError, match="is there already"):
            compose([a, a], output)
        assert sorted(output.parent.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    compose([a, a], tmp_path / "empty")
    assert Adapter.open(tmp_path / "empty").num_entries
