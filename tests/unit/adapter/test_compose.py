"""Composed adapters against sums of dense matrices."""

import pytest
import torch

from speft_ds.adapter.compose import compose
from speft_ds.adapter.format import Adapter
from unit.adapter.samples import SHAPES, UP1, Q, assert_same, flat, matrices, read, refused, write


@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.7, -1.3], [1.0, 1.0, 1.0], [0.1, 2.0, 3.0]])
def test_a_composed_adapter_is_the_weighted_sum(tmp_path, weights):
    parts = [matrices(seed, 0.3) for seed in range(len(weights))]
    folders = [write(tmp_path / str(seed), part) for seed, part in enumerate(parts)]
    met = compose(folders, tmp_path / "sum", weights)
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for part, weight in zip(parts, weights, strict=True):  # fp32, in this order
        expected = {name: total + part[name] * weight for name, total in expected.items()}
    assert_same(read(tmp_path / "sum"), expected)
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
    num_elements = sum(x * y for x, y in SHAPES.values())
    assert facts["mask"] == {
        "num_trainable": adapter.num_entries,
        "num_target_elements": num_elements,
        "density": adapter.num_entries / num_elements,
        "per_layer": {name: int((got[name] != 0).sum()) for name in facts["shapes"]},
    }
    assert facts["base"] == "owner/name" and "recipe" not in facts
    step = facts["history"][0]
    hashes = [Adapter.open(folder).facts["tensors_sha256"] for folder in folders]
    assert (step["command"], step["weights"]) == ("compose", [1.0, 1.0])
    assert [source["tensors_sha256"] for source in step["of"]] == hashes
    assert "compose weights=\\[1.0, 1.0\\] of a, b" in (tmp_path / "sum" / "README.md").read_text()


def test_a_head_is_kept(tmp_path):
    head, classes = torch.randn(3, 16), {"classes": ["a", "b", "c"], "pad_token_id": 2}
    classifier = {"task": "sequence_classification", **classes}
    plain = write(tmp_path / "plain", matrices(0))
    other = write(tmp_path / "head", matrices(1), {"score.weight": head}, **classifier)
    compose([plain, other], tmp_path / "sum", [1.0, 0.5])
    adapter = Adapter.open(tmp_path / "sum")
    assert torch.equal(adapter.value("score.weight"), head)
    assert all(adapter.facts[key] == value for key, value in classifier.items())


def test_what_does_not_fit_is_refused(tmp_path):
    def refuse(folders, weights=None, where="", what=""):
        refused(lambda: compose(folders, tmp_path / "sum", weights), where, what)
        assert not (tmp_path / "sum").exists()

    a = write(tmp_path / "a", matrices(0))
    refuse([a])
    refuse([a, a], [1.0], "--weights")
    refuse([a, a], [1.0, float("nan")], "--weights")
    refuse([a, a], [1e39, 1.0], tmp_path / "sum")  # the deltas overflow
    refuse([a, tmp_path], where=tmp_path)
    zeros, ones = "0" * 64, "1" * 64
    misfits = {
        "owner/name": write(tmp_path / "b", matrices(1), fingerprint=zeros, fingerprint_bfloat16=ones),
        "bfloat16": write(tmp_path / "c", matrices(1), fingerprint=zeros, dtype="bfloat16"),
        Q: write(tmp_path / "d", matrices(1, shapes=SHAPES | {Q: [16, 24]})),
    }
    for what, misfit in misfits.items():
        refuse([a, misfit], where=f"{a} and {misfit}", what=what)
    whole = [write(tmp_path / f"h{n}", matrices(n), {"score.weight": torch.ones(2, 2)}) for n in range(2)]
    refuse(whole, where=f"{whole[0]} and {whole[1]}")


def test_only_a_new_or_empty_folder_is_written_to(tmp_path, monkeypatch):
    a = write(tmp_path / "a", matrices(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for output in (tmp_path / "full", a, tmp_path / "full" / "thesis.tex"):
        before = sorted(tmp_path.rglob("*"))
        refused(lambda output=output: compose([a, a], output), "OUTPUT", str(output))
        assert sorted(tmp_path.rglob("*")) == before
    for name in ("empty", "entered"):
        (tmp_path / name).mkdir()
    compose([a, a], tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "entered")
    compose([a, a], ".")
    assert all(Adapter.open(tmp_path / name).num_entries for name in ("empty", "entered"))
