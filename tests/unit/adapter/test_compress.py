"""Compressed adapters against dense arithmetic, and the largest deltas against a sort."""

import math

import numpy as np
import pytest
import torch

from speft_ds.adapter import compress as module
from speft_ds.adapter.compress import compress
from speft_ds.adapter.format import Adapter
from speft_ds.data.sampler import hash_seed
from unit.adapter.samples import SHAPES, UP, assert_same, flat, matrices, read, refused, write


@pytest.fixture
def squeeze(tmp_path):
    """squeeze(dense, method, ...) -> (matrices of the result, its adapter)."""

    def run(dense, *arguments, **options):
        source = write(tmp_path / f"source{len(list(tmp_path.iterdir()))}", dense)
        adapter = compress(source, source.with_name(f"{source.name}_small"), *arguments, **options)
        return read(adapter.folder), adapter

    return run


def splitmix(value):
    """The finaliser of splitmix64, on Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize(("keep", "seed"), [(0.1, 0), (0.5, 0), (0.5, 7), (1.0, 3)])
def test_dare_drops_by_seed_name_and_index_and_rescales(squeeze, keep, seed):
    dense, expected = matrices(0, 0.5), {}
    for name, values in dense.items():
        own = hash_seed(seed, "dare", name)
        random = [splitmix((index + own) % 2**64) % 2**53 / 2**53 for index in range(values.numel())]
        kept = torch.tensor([value < keep for value in random]).view_as(values)
        expected[name] = torch.where(kept, values / keep, torch.zeros(()))
    assert_same(squeeze(dense, "dare", keep, seed)[0], expected)


def kept_by_sorting(dense, keep):
    """Matrices with the largest deltas alone, of equal ones the first, by a stable sort."""
    values = flat(dense)
    num_kept = max(1, round(keep * int((values != 0).sum())))
    kept, largest = torch.zeros_like(values), values.abs().argsort(descending=True, stable=True)[:num_kept]
    kept[largest] = values[largest]
    parts = kept.split([v.numel() for v in dense.values()])
    return {name: part.view_as(dense[name]) for name, part in zip(dense, parts, strict=True)}


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize(
    "change",
    [
        torch.clone,
        lambda values: (values * 3).round(),  # many are equal
        torch.sign,
        lambda values: values.bfloat16().float(),
        lambda values: values * 10 ** (torch.rand(values.shape) * 76 - 44),  # to denormals
    ],
)
def test_topk_keeps_the_largest_and_of_equal_ones_the_first(squeeze, monkeypatch, change, keep):
    monkeypatch.setattr(module, "CHUNK", 100)
    dense = {name: change(values) for name, values in matrices(0, 0.5).items()}
    assert_same(squeeze(dense, "topk", keep)[0], kept_by_sorting(dense, keep))


@pytest.mark.parametrize(("keep", "scale"), [(0.2, 1.0), (0.5, 3.0), (1.0, 0.5)])
def test_ternary_is_the_sign_of_the_largest_times_the_deviation(squeeze, keep, scale):
    dense = matrices(0, 0.5)
    got, _ = squeeze(dense, "ternary", keep, scale=scale)
    values = flat(dense)
    size = np.float32(scale * values[values != 0].double().numpy().std())
    for name, values in kept_by_sorting(dense, keep).items():
        assert torch.allclose(got[name], values.sign() * size, rtol=1e-6, atol=0.0), name
    assert len(flat(got).unique()) == 3


def test_the_dtype_halves_the_deltas(squeeze, tmp_path):
    dense = matrices(0, 0.5)
    (same, before), (got, after) = squeeze(dense), squeeze(dense, dtype=torch.bfloat16)
    assert_same(same, dense)
    assert_same(got, {name: values.bfloat16().float() for name, values in dense.items()})
    assert before.num_entries == after.num_entries and after.delta_dtype == torch.bfloat16
    assert before.num_bytes - after.num_bytes == 2 * after.num_entries
    again = compress(after.folder, tmp_path / "again", "topk", 0.5)
    assert again.delta_dtype == torch.bfloat16  # stays what it was


def test_facts_and_heads_stay_and_the_history_grows(tmp_path):
    head = torch.randn(2, 16)
    source = write(tmp_path / "run" / "adapter", matrices(0, 0.5), {"score.weight": head})
    compress(tmp_path / "run", tmp_path / "a", "topk", 0.5)
    adapter = compress(tmp_path / "a", tmp_path / "b", "dare", 0.5, seed=4)
    assert torch.equal(adapter.value("score.weight"), head)
    assert adapter.facts["recipe"] == Adapter.open(source).facts["recipe"]
    assert adapter.facts["mask"]["num_trainable"] == adapter.num_entries
    first, second = adapter.facts["history"]
    assert (first["method"], first["keep"]) == ("topk", 0.5) and "seed" not in first
    assert (second["method"], second["seed"], second["of"][0]["folder"]) == ("dare", 4, "a")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"method": "lzma"}, "--method"),
        ({"method": "topk", "keep": 0.0}, "--keep"),
        ({"method": "topk", "keep": 1.1}, "--keep"),
        ({"method": "topk", "keep": math.nan}, "--keep"),
        ({"keep": 0.5}, "--keep"),
        ({"method": "ternary", "scale": 0.0}, "--scale"),
        ({"method": "ternary", "scale": math.inf}, "--scale"),
        ({"method": "dare", "keep": 1e-9}, "small"),  # no entry is left
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, where):
    source = write(tmp_path / "source", matrices(0))
    refused(lambda: compress(source, tmp_path / "small", **options), where)
    assert not (tmp_path / "small").exists()


def test_deltas_without_a_deviation_have_no_ternary_form(tmp_path):
    source = write(tmp_path / "source", {UP: torch.ones(SHAPES[UP])})
    refused(lambda: compress(source, tmp_path / "small", "ternary", 0.5), source)
