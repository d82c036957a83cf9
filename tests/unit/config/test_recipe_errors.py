"""How the problems of a recipe are told: all at once, each once (one by one: `jobs/test_bad_inputs.py`)."""

import pickle

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError
from unit.written import refused

pytestmark = pytest.mark.usefixtures("own_folder")


def test_unknown_recipes():
    with pytest.raises(RecipeError, match=r"quickstrat(.|\n)*fix: .*quickstart"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"nowhere/x\.yaml"):
        load_recipe("nowhere/x.yaml")


def test_a_file_that_is_not_utf_8(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"where: mine\.yaml"):
        load_recipe("mine.yaml")


def test_all_mistakes_are_shown_at_once_with_their_lines(tmp_path):
    text = "mask:\n  desnity: 0.1\n  salience: gradiant\ntrain: {steps: 10}\noptimizer:\n  lr: -1\n"
    error = refused(tmp_path, text, "seed=x", "foo")
    assert sorted(problem.where for problem in error.problems) == [
        "command line: foo",
        "command line: seed=x",
        "mine.yaml:10 (optimizer.lr)",
        "mine.yaml:6 (mask.desnity)",
        "mine.yaml:7 (mask.salience)",
    ]
    shown = str(error)
    assert all(f"\n  {number}. " in shown for number in range(1, 6)) and "pydantic" not in shown


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("mask: {density: 0.1, num_trainable: 5, budget: x}\ntrain: {micro_batch: 3}", 3),
        ("mask: {lift_rank: 2, gate_every: 3, topk_fraction: 0.1, layers: [2, 1]}", 4),
        ("mask: {salience: grasp, zzz: 1}\noptimizer: {warmup_steps: 9}\ntrain: {steps: 5}", 3),
        # What is wrong is no reason to refuse what goes with it.
        ("mask: {schedule: drop_gro, update_every: 3, growth_steps: 7, layer_gate: half}", 1),
        ("optimizer: {name: adamax, eps: 1e-6, momentum: 0.9, betas: [0.9, 0.8]}", 1),
    ],
)
def test_mistakes_neither_hide_nor_repeat_each_other(tmp_path, text, number):
    problems = refused(tmp_path, text).problems
    assert len(problems) == number == len({problem.where for problem in problems})


def test_errors_survive_a_trip_to_another_process(tmp_path):
    error = refused(tmp_path, "seed: x\nmask: 3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
