"""Which keys of the `optimizer` section go with which optimizer."""

import pytest
from speft_ds.config.optimizer_config import OptimizerConfig

from speft_ds.config.load_recipe import load_recipe, resolved_yaml
from unit.written import load, refused

pytestmark = pytest.mark.usefixtures("own_folder")

NO_EFFECT = {  # section -> what is wrong, and the fixes
    "name: sgd, betas: [0.8, 0.9]": (
        "optimizer.betas=[0.8, 0.9] has no effect with optimizer.name=sgd",
        "optimizer.betas=[0.9,0.999], its default, or "
        "optimizer.name=adamw or adamw_8bit or paged_adamw_8bit or lion",
    ),
    "name: sgd, eps: 1e-6": (
        "optimizer.eps=1e-06 has no effect with optimizer.name=sgd",
        "optimizer.eps=1e-08, its default, or optimizer.name=adamw or adamw_8bit or paged_adamw_8bit",
    ),
    "name: lion, eps: 1e-6": (
        "optimizer.eps=1e-06 has no effect with optimizer.name=lion",
        "optimizer.eps=1e-08, its default, or optimizer.name=adamw or adamw_8bit or paged_adamw_8bit",
    ),
    "name: lion, momentum: 0.9": (
        "optimizer.momentum=0.9 has no effect with optimizer.name=lion",
        "optimizer.momentum=0.0, its default, or optimizer.name=sgd",
    ),
    "momentum: 0.9": (
        "optimizer.momentum=0.9 has no effect with optimizer.name=adamw",
        "optimizer.momentum=0.0, its default, or optimizer.name=sgd",
    ),
    "clip_norm: null, clip: per_layer": (
        "optimizer.clip=per_layer has no effect with optimizer.clip_norm=null",
        "optimizer.clip_norm=1.0, or optimizer.clip=global",
    ),
}


@pytest.mark.parametrize("section", NO_EFFECT)
def test_a_key_without_effect_is_refused(tmp_path, section):
    what, fix = NO_EFFECT[section]
    (problem,) = refused(tmp_path, f"optimizer: {{{section}}}").problems
    assert (problem.what, problem.fix) == (what, fix)
    for way in fix.replace(", its default", "").split(", or "):
        load(tmp_path, f"optimizer: {{{section}}}", way.partition(" or ")[0])


def test_it_is_refused_on_the_command_line_too(tmp_path):
    """Even beside another name: unlike a mask's schedule, what is left would be another optimizer's."""
    text = "optimizer: {betas: [0.8, 0.9]}"
    assert load(tmp_path, text, "optimizer.name=lion").optimizer.betas == [0.8, 0.9]
    (problem,) = refused(tmp_path, text, "optimizer.name=sgd").problems
    assert problem.where == "mine.yaml:5 (optimizer.betas)"


def test_a_wrong_name_is_reported_once(tmp_path):
    error = refused(tmp_path, "optimizer: {name: adamax, eps: 1e-6, momentum: 0.9, betas: [0.8, 0.9]}")
    assert [problem.what.partition(" is ")[0] for problem in error.problems] == ["optimizer.name"]


def test_lion_has_betas_of_its_own(tmp_path):
    assert load(tmp_path, "optimizer: {name: lion}").optimizer.betas == [0.9, 0.99]
    assert load(tmp_path, "", "optimizer.name=lion").optimizer.betas == [0.9, 0.99]
    assert load(tmp_path, "optimizer: {name: lion, betas: [0.95, 0.98]}").optimizer.betas == [0.95, 0.98]
    assert OptimizerConfig(name="lion").betas == [0.9, 0.99] and OptimizerConfig().betas == [0.9, 0.999]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "lion"])
def test_the_resolved_recipe_of_a_run_loads_again(tmp_path, name):
    """It gives every key a value, those without effect, too."""
    recipe = load(tmp_path, "", f"optimizer.name={name}")
    (tmp_path / "again.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe("./again.yaml").optimizer == recipe.optimizer


@pytest.mark.parametrize("momentum", ["-0.1", "1.0"])
def test_momentum_has_bounds(tmp_path, momentum):
    shown = str(refused(tmp_path, f"optimizer: {{name: sgd, momentum: {momentum}}}"))
    assert f"optimizer.momentum is {momentum}: must be" in shown
