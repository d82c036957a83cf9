"""lm-eval on the live engine against lm-eval's own HFLM on the plain model, document by document."""

import pytest

from distributed import evaluation_checks
from distributed.reference import make_recipe

TASKS = ["tiny_generate", "tiny_choice", "tiny_letters", "tiny_rolling"]
METRICS = ("acc,none", "exact_match,none", "byte_perplexity,none")


def recipe_for(tiny, folder, **more):
    section = {"tasks": TASKS, "include_path": str(tiny["tasks"]), "batch_size": 4, "limit": 13}
    return make_recipe(tiny, folder, eval={**section, **more})


@pytest.fixture(scope="module")
def stock(ranks, tiny, tmp_path_factory):
    """Stock scores without and with 3 examples in the prompts."""
    recipe = recipe_for(tiny, tmp_path_factory.mktemp("stock"))
    check = evaluation_checks.check_stock_evaluation
    return [ranks(1)(check, recipe=recipe, num_fewshot=k)[0] for k in (None, 3)]


@pytest.mark.parametrize(
    ("world_size", "mode"), [(1, "sharded"), (2, "gathered"), (2, "sharded"), (4, "auto")]
)
def test_scores_are_those_of_stock_lm_eval(ranks, tiny, tmp_path, stock, world_size, mode):
    """Every document once, the same prompts and answers, zero-shot and with examples."""
    recipe = recipe_for(tiny, tmp_path, mode=mode, manual_fewshot=[3])
    results = ranks(world_size)(evaluation_checks.check_evaluation, recipe=recipe)
    assert results[1:] == [None] * (world_size - 1)
    assert [each["document"]["label"] for each in results[0]] == ["before", "before-3shot"]
    for got, wanted in zip(results[0], stock, strict=True):
        is_same_to_the_last_document(got, wanted)
        assert got["document"]["settings"]["mode"] == ("gathered" if mode == "auto" else mode)


def is_same_to_the_last_document(got, wanted):
    assert got["results"].keys() == wanted["results"].keys() == set(TASKS)
    for task, values in wanted["results"].items():
        for key in METRICS:
            got_value = got["results"][task].get(key)
            assert got_value == (pytest.approx(values[key], rel=1e-6) if key in values else None)
        ours, theirs = got["samples"][task], wanted["samples"][task]
        assert [doc for doc, *_ in ours] == [doc for doc, *_ in theirs] == list(range(13))
        for (_, prompt, answer), (_, wanted_prompt, wanted_answer) in zip(ours, theirs, strict=True):
            assert prompt == wanted_prompt
            assert flatten(answer) == pytest.approx(flatten(wanted_answer), abs=1e-4)


def flatten(value):
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flatten(item)]
    return [value] if isinstance(value, str) else [float(value)]
