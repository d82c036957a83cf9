"""Compressed adapters against dense arithmetic."""

import math

import numpy as np
import pytest
import torch

from speft_ds.adapter.compress import METHODS, compress
from speft_ds.adapter.format import Adapter
from speft_ds.data.sampler import hash_seed
from speft_ds.errors import UserError
from unit.test_adapter_tools.made import SHAPES, UP, Q, equal, flat, matrices, read, write


@pytest.fixture
def squeeze(tmp_path):
    """squeeze(dense, method, ...) -> (matrices of the result, its adapter, its sizes)."""

    def run(dense, *arguments, **options):
        source = write(tmp_path / f"source{len(list(tmp_path.iterdir()))}", dense)
        output = source.with_name(f"{source.name}_small")
        sizes = compress(source, output, *arguments, **options)
        return read(output), Adapter.open(output), sizes

    return run


def splitmix(value):
    """The finaliser of splitmix64, on Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize(("keep", "seed"), [(0.1, 0), (0.5, 0), (0.5, 7), (1.0, 3)])
def test_dare_drops_by_seed_name_and_index_and_rescales(squeeze, keep, seed):
    dense = matrices(0, 0.5)
    got, _, _ = squeeze(dense, "dare", keep, seed)
    for name, values in dense.items():
        own = hash_seed(seed, "dare", name)
        random = [splitmix((index + own) % 2**64) % 2**53 / 2**53 for index in range(values.numel())]
        kept = torch.tensor([value < keep for value in random]).view_as(values)
        assert torch.equal(got[name], torch.where(kept, values / keep, torch.zeros(()))), name


def test_dare_does_not_depend_on_the_other_entries(squeeze):
    dense = matrices(0, 0.5)
    alone = {Q: dense[Q] * (torch.arange(16) % 2)}
    all_of_it, some = squeeze(dense, "dare", 0.5)[0], squeeze(alone, "dare", 0.5)[0]
    assert torch.equal(some[Q], all_of_it[Q] * (torch.arange(16) % 2)) and some[Q].any()


def test_dare_keeps_the_fraction_and_the_mean(squeeze):
    dense = {"layers.0.weight": torch.rand(400, 500, generator=torch.Generator().manual_seed(0)) + 0.5}
    count = 200_000
    for keep in (0.1, 0.9):
        got = squeeze(dense, "dare", keep)[0]["layers.0.weight"]
        error = math.sqrt(keep * (1 - keep) / count)
        assert abs(int((got != 0).sum()) / count - keep) < 4 * error
        assert abs(float(got.mean()) - float(dense["layers.0.weight"].mean())) < 6 * error / keep


def kept_by_sorting(dense, keep):
    """Matrices with the largest deltas alone, by a stable sort of all entries."""
    values = flat(dense)
    count = max(1, round(keep * int((values != 0).sum())))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.abs().argsort(descending=True, stable=True)[:count]] = True
    parts = torch.where(chosen, values, torch.zeros(())).split([v.numel() for v in dense.values()])
    return {name: part.view_as(dense[name]) for name, part in zip(dense, parts, strict=True)}


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.3, 1.0])
def test_topk_keeps_the_largest(squeeze, keep):
    for dense in (matrices(0, 0.5), {name: (values * 2).round() for name, values in matrices(1).items()}):
        got, adapter, sizes = squeeze(dense, "topk", keep)
        assert equal(got, kept_by_sorting(dense, keep))
        assert sizes.entries == (int((flat(dense) != 0).sum()), adapter.num_entries)


@pytest.mark.parametrize(("keep", "scale"), [(0.2, 1.0), (0.5, 3.0), (1.0, 0.5)])
def test_ternary_is_the_sign_of_the_largest_times_the_deviation(squeeze, keep, scale):
    dense = matrices(0, 0.5)
    got, _, _ = squeeze(dense, "ternary", keep, scale=scale)
    values = flat(dense)
    size = np.float32(scale * values[values != 0].double().numpy().std())
    for name, values in kept_by_sorting(dense, keep).items():
        assert torch.allclose(got[name], values.sign() * size, rtol=1e-6, atol=0.0), name
    assert len(flat(got).unique()) == 3


def test_the_dtype_halves_the_deltas(squeeze, tmp_path):
    dense = matrices(0, 0.5)
    got, adapter, sizes = squeeze(dense, dtype=torch.bfloat16)
    assert all(torch.equal(got[name], dense[name].bfloat16().float()) for name in dense)
    assert adapter.delta_dtype() == torch.bfloat16 and sizes.entries[0] == sizes.entries[1]
    assert sizes.bytes[0] - sizes.bytes[1] == 2 * adapter.num_entries
    file = tmp_path / adapter.folder.name / "adapter.safetensors"
    assert sizes.bytes[1] == file.stat().st_size
    compress(adapter.folder, tmp_path / "again", "topk", 0.5)  # stays what it was
    assert Adapter.open(tmp_path / "again").delta_dtype() == torch.bfloat16


def test_without_an_option_nothing_changes(squeeze):
    dense = matrices(0)
    assert equal(squeeze(dense)[0], dense)


def test_facts_and_heads_stay_and_the_history_grows(tmp_path):
    head = torch.randn(2, 16)
    source = write(tmp_path / "run" / "adapter", matrices(0, 0.5), {"score.weight": head})
    compress(tmp_path / "run", tmp_path / "a", "topk", 0.5)
    compress(tmp_path / "a", tmp_path / "b", "dare", 0.5, seed=4)
    adapter = Adapter.open(tmp_path / "b")
    assert torch.equal(adapter.head("score.weight"), head)
    assert adapter.facts["recipe"] == Adapter.open(source).facts["recipe"]
    assert adapter.facts["mask"]["num_trainable"] == adapter.num_entries
    first, second = adapter.facts["history"]
    assert (first["method"], first["keep"]) == ("topk", 0.5) and "seed" not in first
    assert (second["method"], second["seed"], second["of"][0]["folder"]) == ("dare", 4, "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lzma"}, ", ".join(METHODS)),
        ({"method": "topk", "keep": 0.0}, "--keep is 0.0"),
        ({"method": "topk", "keep": 1.1}, "--keep is 1.1"),
        ({"method": "topk", "keep": math.nan}, "--keep is nan"),
        ({"keep": 0.5}, "--method"),
        ({"method": "ternary", "scale": 0.0}, "--scale is 0.0"),
        ({"method": "ternary", "scale": math.inf}, "--scale is inf"),
        ({"method": "dare", "keep": 1e-9}, "no entry is left"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, said):
    source = write(tmp_path / "source", matrices(0))
    with pytest.raises(UserError) as caught:
        compress(source, tmp_path / "small", **options)
    assert said in str(caught.value) and not (tmp_path / "small").exists()


def test_deltas_without_a_deviation_have_no_ternary_form(tmp_path):
    source = write(tmp_path / "source", {UP: torch.ones(SHAPES[UP])})
    with pytest.raises(UserError, match="no standard deviation"):
        compress(source, tmp_path / "small", "ternary", 0.5)
