"""lm-eval on the live engine against lm-eval's own HFLM on the plain model, document by document."""

import pytest

from distributed import checks
from distributed.reference import make_recipe


def recipe_for(tiny, folder):
    section = {
        "tasks": ["tiny_generate", "tiny_choice"],
        "include_path": str(tiny["tasks"]),
        "batch_size": 4,
        "limit": 13,
    }
    return make_recipe(tiny, folder, eval=section)


@pytest.fixture(scope="module")
def stock(ranks, tiny, tmp_path_factory):
    return ranks(1)(checks.check_stock_evaluation, recipe=recipe_for(tiny, tmp_path_factory.mktemp("stock")))[
        0
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_are_those_of_stock_lm_eval(ranks, tiny, tmp_path, stock, world_size):
    results = ranks(world_size)(checks.check_evaluation, recipe=recipe_for(tiny, tmp_path))
    assert results[1:] == [None] * (world_size - 1)
    got = results[0]
    assert got["results"].keys() == stock["results"].keys()
    for task, values in stock["results"].items():
        for key in ("acc,none", "exact_match,none"):
            assert got["results"][task].get(key) == values.get(key)
    for task, samples in stock["samples"].items():
        assert [doc for doc, _ in got["samples"][task]] == [doc for doc, _ in samples] == list(range(13))
        for (_, ours), (_, theirs) in zip(got["samples"][task], samples, strict=True):
            assert flatten(ours) == pytest.approx(flatten(theirs), abs=1e-4)


def flatten(value):
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flatten(item)]
    return [value] if isinstance(value, str) else [float(value)]
