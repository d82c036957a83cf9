"""The file of a study: where each of its problems is, and what to type instead."""

import pytest

from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import RecipeError
from speft_ds.study.runs import Grid
from speft_ds.study.study_config import load_study


def problems(path, *given):
    """(where, fix) of each problem of a study, or of its recipes."""
    with pytest.raises(RecipeError) as caught:
        Grid(load_study(path, given)).first_runs()
    return [(problem.where, problem.fix) for problem in caught.value.problems]


def line(path, key):
    """`study.yaml:7` of the line that a key is on."""
    lines = path.read_text().splitlines()
    return f"study.yaml:{1 + next(n for n, text in enumerate(lines) if text.strip().startswith(f'{key}:'))}"


@pytest.mark.parametrize(
    ("changes", "key", "fix"),
    [
        ({"axes": {"mask.densty": [0.1]}}, "mask.densty", "mask.density"),
        ({"axes": {"mask": [0.1]}}, "mask", "mask."),
        ({"axes": {"mask.density": 0.1}}, "mask.density", ""),
        ({"axes": {"mask.density": []}}, "mask.density", ""),
        ({"axes": {"output_dir": ["a"]}}, "output_dir", "--output"),
        ({"axis": {}}, "axis", "axes"),
        ({"variants": {"random": {"mask.density": 0.1}}}, "mask.density", "study.yaml:"),
        ({"variants": {"random": 3}}, "random", ""),
        ({"set": {"eval.validation": "rows.jsonl", "seed": 3}}, "seed", "study.yaml:"),
        ({"seeds": [1, 1]}, "seeds", ""),
        ({"axes": {"mask.density": [0.01, 1.0e-2]}}, "mask.density", ""),
        ({"rates": {"start": [1e-3], "factor": 1}}, "factor", ""),
        ({"rates": {"start": [1e-3], "faktor": 2}}, "faktor", "factor"),
        ({"rates": {"start": [1e-3], "variants": {"rndom": [1e-2]}}}, "rndom", "random"),
        ({"rates": {"start": [1e-3]}, "axes": {"optimizer.lr": [1e-4]}}, "rates", "axes.optimizer.lr"),
        ({"reference": "rndom"}, "reference", "random"),
        ({"metric": "sst2/acc"}, "metric", "validation_loss"),
        # What only the recipe knows, at the line of the study that gives the value.
        ({"axes": {"mask.density": [0.1, 5]}}, "mask.density", "mask.density"),
        ({"axes": {"mask.salience": ["snip", "magnitud"]}, "variants": None, "reference": None},
         "mask.salience", "magnitude"),
        ({"set": {"train.steps": 5, "eval.validation": "rows.jsonl", "optimizer.warmup_steps": 9}},
         "optimizer.warmup_steps", "optimizer.warmup_steps"),
        # A table of several bases.
        ({"variants": {"gradient": None, "random": {"model.name_or_path": "owner/other"}}},
         "model.name_or_path", ""),
    ],
)  # fmt: skip
def test_a_problem_has_its_line_and_a_fix(write, changes, key, fix):
    path = write(**changes)
    (found,) = problems(path)
    assert found[0].startswith(line(path, key)) and fix in found[1]


def test_all_problems_at_once(write):
    found = problems(write(metrik="loss", rates={"start": ["x"]}, seeds=[-1]))
    assert len(found) == 3
    # The same problem of several runs is one.
    assert len(problems(write(axes={"mask.density": [5], "train.steps": [3, 4]}))) == 1


def test_the_command_line(write):
    grid = Grid(load_study(write(), ["train.steps=3", "mask.salience=snip"]))
    assert {(run.recipe.train.steps, run.recipe.mask.salience) for run in grid.first_runs()} == {(3, "snip")}
    ((where, _),) = problems(write(), "mask.density=0.2")
    assert where == "command line: mask.density=0.2"
    ((where, fix),) = problems(write(), "train.stps=0.2")
    assert where == "command line: train.stps=0.2" and "train.steps" in fix


def test_what_is_no_study(write, tmp_path):
    for text in ("", "- a\n", "a: [\n", "seeds: [1]\n"):
        write().write_text(text)
        ((where, fix),) = problems(tmp_path / "study.yaml")
        assert where.startswith("study.yaml") and fix
    ((where, _),) = problems(tmp_path / "none.yaml")
    assert where.endswith("none.yaml")


def test_seeds_may_stand_among_the_axes(write):
    study = load_study(write(seeds=None, axes={"seed": [4, 5]}))
    assert (study.seeds, study.axes) == ([4, 5], {})


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_of_the_repository_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Grid(load_study(path)).first_runs()
