"""Recipes that extend others."""

import re

import pytest

from speft_ds.config.load_recipe import RECIPES_DIR, load_recipe
from speft_ds.errors import RecipeError

pytestmark = pytest.mark.usefixtures("own_folder")


BASE = "model:\n  name_or_path: owner/name\ndata: {path: rows.jsonl}\noptimizer:\n  lr: 2e-4\n  eps: 1e-6\n"


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_child_over_parent_override_over_child(tmp_path):
    write(tmp_path, base=BASE, child="seed: 3\noptimizer:\n  lr: 3e-4\nextends: ./base.yaml\n")
    child = load_recipe("child.yaml")
    assert (child.optimizer.lr, child.optimizer.eps, child.seed) == (3e-4, 1e-6, 3)
    assert child.optimizer.betas == load_recipe("base.yaml").optimizer.betas
    assert load_recipe("child.yaml", ["optimizer.lr=4e-4"]).optimizer.lr == 4e-4
    assert (child.name, child.output_dir) == ("child", "runs/child")
    assert child.where("optimizer.lr") == "child.yaml:3 (optimizer.lr)"
    assert child.where("optimizer.eps") == "base.yaml:6 (optimizer.eps)"
    assert child.where("optimizer.clip_norm") == "optimizer.clip_norm (default)"
    assert load_recipe("child.yaml", ["optimizer.lr=4e-4"]).where("optimizer.lr").startswith("command line")


def test_a_grandchild_takes_from_all_and_paths_start_at_the_file_that_has_them(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, base=BASE)
    write(tmp_path / "deep", child="extends: ../base.yaml\nseed: 3\n", grandchild="extends: ./child.yaml\n")
    grandchild = load_recipe("deep/grandchild.yaml")
    assert (grandchild.seed, grandchild.optimizer.lr) == (3, 2e-4)
    write(tmp_path, outside=f"extends: {tmp_path}/deep/child.yaml\n")
    assert load_recipe("outside.yaml").seed == 3


def test_a_recipe_is_extended_by_name_from_anywhere(tmp_path):
    write(tmp_path, mine="extends: llama2_7b_alpaca\nmask: {density: 0.01}\n")
    mine, parent = load_recipe("mine.yaml"), load_recipe("llama2_7b_alpaca", ["mask.density=0.01"])
    own = {"name": "mine", "output_dir": "runs/mine"}
    assert mine.model_dump() == parent.model_dump() | own


def test_recipes_of_the_repository_point_at_the_file_that_says_it():
    recipe = load_recipe("llama2_70b_alpaca")
    for key, file in [
        ("model.name_or_path", "llama2_70b_alpaca"),
        ("train.micro_batch", "llama2_70b_alpaca"),
        ("train.global_batch", "llama2_13b_alpaca"),
        ("data.path", "llama2_13b_alpaca"),
    ]:
        assert re.match(rf"{RECIPES_DIR}/{file}\.yaml:\d+ \({key}\)$", recipe.where(key))


def test_an_empty_section_null_and_a_list_in_a_child(tmp_path):
    child = "extends: ./base.yaml\noptimizer:\nmask:\n  density: null\n  targets: [c]\n"
    write(tmp_path, base=BASE + "mask:\n  targets: [a, b]\n", child=child)
    recipe = load_recipe("child.yaml", ["mask.num_trainable=5"])
    assert (recipe.optimizer.lr, recipe.optimizer.eps) == (2e-4, 1e-6)  # an empty section changes nothing
    assert recipe.mask.targets == ["c"]  # a list replaces the parent's


def test_inherited_problems_are_reported_with_the_parents_file_and_line(tmp_path):
    parent = BASE + "seed: wrong\nmask:\n  desnity: 0.1\n"
    write(tmp_path, base=parent, child="extends: ./base.yaml\ntrain:\n  steps: few\n")
    problems = problems_of("child.yaml")
    assert {(problem.what.partition(" is ")[0], problem.where) for problem in problems} == {
        ("unknown key mask.desnity", "base.yaml:9 (mask.desnity)"),
        ("seed", "base.yaml:7 (seed)"),
        ("train.steps", "child.yaml:3 (train.steps)"),
    }


def test_a_later_one_of_two_keys_that_exclude_each_other_sets_the_first_aside(tmp_path):
    write(tmp_path, base=BASE + "train: {epochs: 3}\n", child="extends: ./base.yaml\n\ntrain: {steps: 9}\n")
    for overrides, length in ([], (9, None)), (["train.epochs=2"], (None, 2)), (["train.steps=4"], (4, None)):
        train = load_recipe("child.yaml", overrides).train
        assert (train.steps, train.epochs) == length
    assert load_recipe("base.yaml", ["train.steps=null"]).train.epochs == 3
    mask = load_recipe("base.yaml", ["mask.num_trainable=7"]).mask
    assert (mask.density, mask.num_trainable) == (None, 7)
    write(tmp_path, child="extends: ./base.yaml\ntrain: {steps: 9, epochs: 1}\n")
    (problem,) = problems_of("child.yaml")
    assert problem.where == "child.yaml:2 (train.steps)"
    (problem,) = problems_of("base.yaml", "train.steps=1", "train.epochs=1")
    assert problem.where == "command line: train.steps=1"


def test_a_cycle_is_refused_with_its_files_in_order(tmp_path):
    write(
        tmp_path, a="extends: ./b.yaml\n", b="seed: 1\n\nextends: c.yaml\n", c=f"extends: {tmp_path}/a.yaml\n"
    )
    (problem,) = problems_of("a.yaml")
    assert (
        "a.yaml > b.yaml > c.yaml" in problem.what and problem.where == "c.yaml:1 (extends)" and problem.fix
    )


@pytest.mark.parametrize(
    "value", ["quickstrat", "./nowhere.yaml", "[quickstart]", "{name: quickstart}", "", "null"]
)
def test_extends_names_one_recipe_that_is_there(tmp_path, value):
    write(tmp_path, child=f"seed: 1\nextends: {value}\n")
    (problem,) = problems_of("child.yaml")
    assert problem.where == "child.yaml:2 (extends)" and problem.fix


def test_extends_twice(tmp_path):
    write(tmp_path, child="extends: quickstart\nextends: llama2_7b_alpaca\n")
    (problem,) = problems_of("child.yaml")
    assert problem.where == "child.yaml:2 (extends)" and "child.yaml:1 (extends)" in problem.fix


def test_a_parent_that_is_no_recipe(tmp_path):
    write(
        tmp_path, base="seed: [\n", empty="", child="extends: ./base.yaml\n", other="extends: ./empty.yaml\n"
    )
    (problem,) = problems_of("child.yaml")
    assert problem.where.startswith("base.yaml:")
    (problem,) = problems_of("other.yaml")
    assert problem.where == "empty.yaml"
