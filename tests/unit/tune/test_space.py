"""What a search varies: ranges and choices of keys, and what is refused before anything runs."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError
from speft_ds.tune.space import as_overrides, default_space, read_space


def space(*texts, overrides=()):
    return read_space(texts, "quickstart", overrides)


def test_ranges_and_choices():
    texts = ["optimizer.lr=1e-4..1e-2", "mask.density=0.01..0.05", "train.max_nonfinite=2..30"]
    assert space(*texts, "mask.targets=[q_proj, v_proj],null", "mask.salience=snip") == {
        "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "mask.density": FloatDistribution(0.01, 0.05),
        "train.max_nonfinite": IntDistribution(2, 30, log=True),
        "mask.targets": CategoricalDistribution(['["q_proj", "v_proj"]', "null"]),
        "mask.salience": CategoricalDistribution(["snip"]),
    }


def test_values_read_as_they_were_given():
    params = {"optimizer.lr": 0.00123456, "mask.targets": '["q_proj", "v_proj"]', "mask.num_trainable": 7}
    recipe = load_recipe("quickstart", as_overrides(params))
    assert recipe.optimizer.lr == 0.00123
    assert recipe.mask.targets == ["q_proj", "v_proj"] and recipe.mask.num_trainable == 7


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("mask.densty=0.1..0.2", "mask.density"),
        ("mask.density=0.1..2", "mask.density"),
        ("mask.density=0.2..0.1", "1e-4..1e-2"),
        ("mask.density=a..b", "1e-4..1e-2"),
        ("mask.density", "A,B"),
        ("mask.density=", "A,B"),
        ("mask.salience=gradient,snap", "snip"),
        ("mask.num_trainable=10.0..20.5", "mask.num_trainable"),
        ("eval.limit=3,4", "eval.limit=..."),
        ("output_dir=a,b", "output_dir=..."),
    ],
)
def test_what_is_refused_names_the_option_and_a_fix(text, fix):
    with pytest.raises(RecipeError) as refused:
        space("optimizer.lr=1e-4..1e-2", text)
    (problem,) = refused.value.problems
    assert text in problem.where and fix in problem.fix


def test_all_problems_at_once():
    with pytest.raises(RecipeError) as refused:
        space("optimizer.lr=-1..1", "optimizer.lr=1,2", "mask.budgets=global")
    assert len(refused.value.problems) == 3


@pytest.mark.parametrize("overrides", [[], ["mask.num_trainable=5"], ["mask.compute=0.01"], ["mask.load=x"]])
def test_the_default_space_suits_the_recipe(overrides):
    recipe = load_recipe("quickstart", overrides)
    found = space(*default_space(recipe), overrides=overrides)
    assert "optimizer.lr" in found and ("mask.salience" in found) == (recipe.mask.load is None)
