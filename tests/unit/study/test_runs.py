"""The settings of a study, what its runs are told apart by, and the sweep of rates."""

import math

import pytest

from speft_ds.study.runs import Grid, next_rates
from speft_ds.study.study_config import RatesConfig, load_study


def test_every_variant_at_every_point_with_every_seed(write):
    grid = Grid(load_study(write()))
    runs = grid.first_runs()
    found = [(run.recipe.mask.salience, run.recipe.mask.density, run.recipe.seed) for run in runs]
    expected = [(s, d, seed) for s in ("gradient", "random") for d in (0.01, 0.1) for seed in (1, 2, 3)]
    assert found == expected and len({run.key for run in runs}) == len({run.name for run in runs}) == 12
    assert {run.recipe.eval.validation for run in runs} == {"rows.jsonl"}


def test_the_counterpart_differs_by_the_reference_alone(write):
    grid = Grid(load_study(write()))
    found = [(grid.counterpart(each).variant, grid.counterpart(each).point) for each in grid.settings]
    assert found == [("random", each.point) for each in grid.settings]
    grid = Grid(load_study(write(reference="mask.density=0.1")))
    found = [(grid.counterpart(each).variant, grid.counterpart(each).point) for each in grid.settings]
    assert found == [(each.variant, {"mask.density": 0.1}) for each in grid.settings]


def test_a_run_is_what_it_learns(write):
    """Not its folder, its split into micro-batches, or its study; but what a study varies, whatever it is."""

    def keys(*given, **changes):
        return {run.key for run in Grid(load_study(write(**changes), given)).first_runs()}

    first = keys()
    assert keys("train.micro_batch=1", "eval.batch_size=3", "deepspeed.config=zero3_cpu") == first
    assert keys("train.steps=null", "mask.budget=global") == first  # the defaults
    assert keys(seeds=[3, 4]) & first and keys(axes={"mask.density": [0.1, 0.2]}) & first
    for change in ("train.steps=9", "model.dtype=float32", "data.max_length=9", "eval.limit=3"):
        assert keys(change).isdisjoint(first)
    assert len(keys(axes={"train.overlap": [True, False]}, variants=None, reference=None, seeds=[1])) == 2


@pytest.mark.parametrize(
    ("best", "start", "most", "expected"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3], 7, []),
        (3e-2, [3e-4, 1e-3, 3e-3], 7, [9e-3, 2.7e-2, 8.1e-2]),
        (1e-5, [3e-4, 1e-3, 3e-3], 7, [1e-4, 3.33e-5, 1.11e-5, 3.7e-6]),
        (1.0, [3e-4, 1e-3, 3e-3], 5, [9e-3, 2.7e-2]),  # enough were tried
        (1e-3, [1e-3], 7, [3e-3, 3.33e-4]),
    ],
)
def test_rates_until_the_best_is_inside(best, start, most, expected):
    """Of runs whose score falls with the distance of the rate to the best one."""
    config = RatesConfig(start=start, most=most)
    scores = {rate: -abs(math.log(rate / best)) for rate in start}
    tried = []
    while more := next_rates(config, scores):
        tried += more
        scores |= {rate: -abs(math.log(rate / best)) for rate in more}
    assert tried == expected
    highest = max(scores, key=scores.get)
    assert len(scores) == most or min(scores) < highest < max(scores)


def test_a_rate_that_fails_is_an_edge():
    assert next_rates(RatesConfig(start=[1.0]), {1e-3: 1.0, 1e-2: 2.0, 1e-1: -math.inf}) == []
    assert next_rates(RatesConfig(start=[1.0]), {1e-3: -math.inf}) == []


def test_a_variant_may_begin_elsewhere(write):
    rates = {"start": [1e-3, 1e-2], "variants": {"random": [1e-5]}}
    runs = Grid(load_study(write(axes=None, rates=rates))).first_runs()
    found = {(run.setting.variant, run.rate) for run in runs}
    assert found == {("gradient", 1e-3), ("gradient", 1e-2), ("random", 1e-5)}


def test_other_seeds_follow_at_the_best_rate(write):
    grid = Grid(load_study(write(axes=None, rates={"start": [1e-3, 1e-2]}, variants=None, reference=None)))
    (setting,) = grid.settings
    scores = {}

    def missing():
        return [run for run in grid.progress(setting, scores.get).runs if run.key not in scores]

    tried = []
    while todo := missing():
        tried.append([(run.rate, run.recipe.seed) for run in todo])
        scores |= {run.key: -abs(math.log(run.rate / 8e-3)) for run in todo}
    assert tried == [[(1e-3, 1), (1e-2, 1)], [(3e-2, 1)], [(1e-2, 2), (1e-2, 3)]]
    assert grid.progress(setting, scores.get).best_rate == 1e-2
