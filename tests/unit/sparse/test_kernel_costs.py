"""`auto` chooses by a table of measured costs: the choice, the estimates, the measurement and its cache."""

import json
import math
from dataclasses import replace

import pytest
import torch

from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError
from speft_ds.sparse.gradient import gradient_cost
from speft_ds.sparse.kernels import measure
from speft_ds.sparse.kernels.backends import expected_backend, make_backend
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.kernels.triton_backends import BlockGradient, ElementGradient
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.tiles import Tiles
from unit.sparse.tables import keep, sampling, table

CPU = torch.device("cpu")
SHAPE = (40, 50)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a measurement of milliseconds."""
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPEFT_DS_KERNELS", "measured")
    monkeypatch.setitem(measure.SHAPES, "cpu", [(48, 64), (64, 48)])
    monkeypatch.setitem(measure.NUM_TOKENS, "cpu", [16])
    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """The dtypes of all measurements from here on, which are real."""
    dtypes, real = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda *args: dtypes.append(args[1]) or real(*args))
    return dtypes


def spread(density, share=1.0, shape=SHAPE):
    """[k] entries evenly over the first columns."""
    width = round(share * shape[1])
    chosen = torch.randperm(shape[0] * width, generator=torch.Generator().manual_seed(0))
    chosen = chosen[: round(density * shape[0] * shape[1])]
    return (chosen // width * shape[1] + chosen % width).sort().values.int()


IN_PROPORTION = {"columns": lambda d, s, _: s, "sampled_columns": lambda d, s, _: 2.0}


@pytest.mark.parametrize(
    ("laws", "density", "share", "chosen"),
    [
        # Against the rule of thumb, which samples up to 10%, both ways.
        ({"sampled": lambda d, *_: 0.5 + 10 * d}, 0.04, 1.0, "sampled"),
        ({"sampled": lambda d, *_: 0.5 + 10 * d}, 0.07, 1.0, "dense"),
        ({"sampled": lambda d, *_: 0.5 + d}, 0.4, 1.0, "sampled"),
        ({"sampled": lambda d, *_: 0.3 + d, **IN_PROPORTION}, 0.1, 0.2, "columns"),
        ({"sampled": lambda d, *_: 0.02 + d, **IN_PROPORTION}, 0.1, 0.2, "sampled"),
        ({"sampled": lambda d, *_: 0.45 + d / 10, **IN_PROPORTION}, 0.3, 0.46, "sampled"),  # about equal
        ({"columns": lambda *_: 0.1}, 0.4, 0.7, "dense"),  # in more columns than were measured
        ({"columns": lambda *_: 0.1}, 0.4, 0.5, "columns"),
        ({}, 0.001, 1.0, "dense"),  # nothing else runs here
    ],
)
def test_auto_follows_the_table(laws, density, share, chosen):
    costs = table(**laws)
    index = spread(density, share)
    name, backend = make_backend("auto", index, SHAPE, costs=costs)
    assert name == chosen
    x, grad_y = torch.randn(19, SHAPE[1]), torch.randn(19, SHAPE[0])
    expected = (grad_y.double().t() @ x.double()).view(-1)[index.long()]
    assert torch.allclose(backend(x, grad_y).double(), expected, atol=1e-4)
    planned = expected_backend("auto", density, CPU, "element", 1, share, costs, SHAPE)
    assert planned == chosen


def test_inside_its_columns_a_mask_is_sampled_where_that_is_cheaper():
    product = {}
    for cheap, dear in (("columns", "sampled_columns"), ("sampled_columns", "columns")):
        laws = {cheap: lambda d, s, _: 0.01 + s * 0.1, dear: lambda d, s, _: 0.5 + s}
        _, backend = make_backend("auto", spread(0.01, 0.2), SHAPE, costs=table(**laws))
        product[cheap] = type(backend.product).__name__
    assert product == {"columns": "DenseGradient", "sampled_columns": "SampledGradient"}


@pytest.mark.parametrize(("at_a_tenth", "chosen"), [(0.1, "tiled"), (0.9, "sampled")])
def test_full_rows_go_by_what_a_part_of_the_dense_product_costs(at_a_tenth, chosen):
    tiles = Tiles.of("row", 1, SHAPE)
    index = tiles.entries(torch.arange(4)).int()  # a tenth of the rows
    law = {"columns": lambda d, s, _: at_a_tenth * s / 0.1, "sampled": lambda d, *_: 0.3 + d}
    assert make_backend("auto", index, SHAPE, tiles, costs=table(**law))[0] == chosen
    assert expected_backend("auto", 0.1, CPU, "row", 1, None, table(**law), SHAPE) == chosen


def test_on_a_gpu_it_goes_by_what_the_mask_moves(monkeypatch):
    """Equally many entries: in few columns, rows share what is moved. The choice alone runs without a GPU."""
    monkeypatch.setattr("speft_ds.sparse.kernels.triton_backends.is_available", lambda: True)
    shape, tiles = (256, 256), Tiles.of("block", 8, (256, 256))
    crowded, uniform = spread(0.01, 0.04, shape), spread(0.01, 1.0, shape)
    low, high = ElementGradient(crowded, shape).load, ElementGradient(uniform, shape).load
    assert 1.3 * low < high
    costs = table(element=lambda d, s, load: 2 * load / (low + high), sampled=lambda *_: 9.0)
    chosen = [make_backend("auto", index, shape, costs=costs)[0] for index in (crowded, uniform)]
    assert chosen == ["element", "dense"]
    few, many = (tiles.entries(torch.arange(0, tiles.num_tiles, every)).int() for every in (50, 2))
    low, high = (BlockGradient(index, shape, tiles).load for index in (few, many))
    costs = table(tiled=lambda d, s, load: 2 * load / (low + high))
    chosen = [make_backend("auto", index, shape, tiles, costs=costs)[0] for index in (few, many)]
    assert chosen == ["tiled", "dense"]


def test_without_a_table_auto_goes_by_the_rules_and_a_named_backend_by_neither():
    assert make_backend("auto", spread(0.05), SHAPE)[0] == "sampled"
    assert make_backend("auto", spread(0.05), SHAPE, costs=sampling(False))[0] == "dense"
    assert make_backend("sampled", spread(0.05), SHAPE, costs=sampling(False))[0] == "sampled"


def test_the_cost_of_a_mask_is_that_of_its_weights_by_their_size(tmp_path):
    index = {"a": spread(0.02), "b": spread(0.1, shape=(80, 50)), "c": spread(0.0)}
    mask = Mask(index, {"a": SHAPE, "b": (80, 50), "c": SHAPE})
    values = {"model": {"name_or_path": "m"}, "data": {"path": "rows.jsonl"}, "output_dir": str(tmp_path)}
    costs = table(sampled=lambda d, *_: 0.1 + 20 * d)
    found = gradient_cost(mask, Recipe.model_validate(values), costs, {})
    # a: 0.1 + 0.4 on 2,000 elements; b: dense, on 4,000; c: nothing, on 2,000.
    assert found["over_dense"] == pytest.approx((0.5 * 2000 + 4000) / 8000)
    assert found["backends"] == {"sampled": 1, "dense": 1} and found["device"] == costs.device


def test_estimates_are_linear_within_the_nearest_class():
    costs = table(sampled=lambda d, *_: 0.1 + 2 * d, columns=lambda d, s, _: 0.02 + 0.7 * s + 0.5 * d)
    near = tuple(
        replace(one, over_dense=2 * one.over_dense) if one.shape == (64, 64) else one
        for one in costs.measurements
    )
    costs = replace(costs, measurements=near)  # the small class costs twice as much
    assert costs.estimate("sampled", (2000, 2000), 1024, density=0.03) == pytest.approx(0.16)
    assert costs.estimate("sampled", (2000, 2000), 1, density=0.03) == pytest.approx(0.16)
    assert costs.estimate("sampled", (50, 80), 64, density=0.03) == pytest.approx(0.32)
    found = costs.estimate("columns", (2048, 2048), 1024, share=0.3, density=0.1)
    assert found == pytest.approx(0.28)
    assert costs.estimate("element", (64, 64), 32, density=0.1) == math.inf
    assert costs.max_density("sampled", (2048, 2048), 1024) == pytest.approx(0.45)
    assert sampling(False).max_density("sampled", (64, 64), 32) == 0


def test_a_noisy_measurement_makes_no_mask_cheaper_for_having_more_entries():
    costs = table(sampled=lambda d, *_: 0.4 - 0.5 * d)
    few, many = (costs.estimate("sampled", (64, 64), 32, density=d) for d in (0.0, 0.9))
    assert 0.2 < few == many < 0.4


def test_it_is_measured_once_and_kept(cache, measured):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = measure.find_costs(CPU, "float32")
    assert torch.equal(torch.get_rng_state(), state)  # a run draws the same with and without it
    assert measure.find_costs(CPU, "float32") == first and measured == ["float32"]
    assert measure.find_costs(CPU, "bfloat16").dtype == "bfloat16" and len(measured) == 2
    again = measure.find_costs(CPU, "float32", remeasure=True)
    assert len(measured) == 3 and measure.find_costs(CPU, "float32") == again
    assert first.classes == [((48, 64), 16), ((64, 48), 16)]
    kinds = {one.backend for one in first.measurements}
    assert kinds == {"sampled", "columns", "sampled columns"} and len(first.measurements) == 24
    assert all(0 < one.over_dense < 1000 and 0 < one.density <= one.share for one in first.measurements)


def damage_version(document):
    document["format_version"] = 99


def damage_device(document):
    document["device"] = "another"


def damage_torch(document):
    document["torch"] = "1.0"


def damage_cost(document):
    document["measurements"][0]["over_dense"] = -1.0


def damage_shape(document):
    document["measurements"][0]["shape"] = [0, 4]


def damage_rows(document):
    del document["measurements"]


@pytest.mark.parametrize(
    "damage", [damage_version, damage_device, damage_torch, damage_cost, damage_shape, damage_rows]
)
def test_what_is_no_table_of_this_device_is_said_and_measured_anew(cache, measured, capsys, damage):
    costs = sampling(True, device=measure.device_name(CPU))
    path = keep(costs)
    assert measure.find_costs(CPU, "float32") == costs and not measured
    document = costs.to_json()
    damage(document)
    path.write_text(json.dumps(document))
    capsys.readouterr()
    found = measure.find_costs(CPU, "float32")
    assert measured == ["float32"] and str(path) in capsys.readouterr().out
    assert KernelCosts.from_json(json.loads(path.read_text())) == found != costs


@pytest.mark.parametrize("content", [b"", b'{"format_version": 1', b"[]", b"\xff\xfe", b"[" * 5000, b"NaN"])
def test_a_file_that_is_no_json_is_no_table(cache, measured, capsys, content):
    path = keep(sampling(True, device=measure.device_name(CPU)))
    path.write_bytes(content)
    measure.find_costs(CPU, "float32")
    assert measured == ["float32"] and str(path) in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_said_and_the_measurement_used(cache, measured, capsys):
    cache.write_text("a file")
    assert measure.find_costs(CPU, "float32").measurements and measured == ["float32"]
    assert "note: " in capsys.readouterr().out and cache.read_text() == "a file"


def test_a_backend_that_fails_here_is_left_out(cache, capsys, monkeypatch):
    class Failing(measure.SampledGradient):
        def __call__(self, x, grad_y):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(measure, "SampledGradient", Failing)
    kinds = {one.backend for one in measure.measure(CPU, "float32").measurements}
    assert kinds == {"columns", "sampled columns"} and "no such instruction" in capsys.readouterr().out


def test_threads_and_instructions_are_part_of_the_device(monkeypatch):
    names = {measure.device_name(CPU, threads) for threads in (1, 2)}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    names.add(measure.device_name(CPU, 1))
    paths = {measure.cache_path(name, dtype) for name in names for dtype in ("float32", "bfloat16")}
    assert len(names) == 3 and len(paths) == 6


def test_an_unknown_way_to_choose_is_refused(monkeypatch):
    from speft_ds.env import kernels_are_measured

    for value, is_measured in (("", True), ("measured", True), ("rules", False)):
        monkeypatch.setenv("SPEFT_DS_KERNELS", value)
        assert kernels_are_measured() is is_measured
    monkeypatch.setenv("SPEFT_DS_KERNELS", "rule")
    with pytest.raises(UserError) as refused:
        kernels_are_measured()
    assert refused.value.where == "SPEFT_DS_KERNELS" and "SPEFT_DS_KERNELS=rules" in refused.value.fix
