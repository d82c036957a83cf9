"""Where a run goes on: which checkpoint of which folder, and what is said where there is none."""

from pathlib import Path

import pytest

from speft_ds.errors import UserError
from speft_ds.training.checkpoint.folder import folder_of
from speft_ds.training.checkpoint.resume import (
    IF_ANY,
    NEWEST,
    Resume,
    Start,
    find_start,
    recipe_to_resume,
    resume_hint,
)
from unit.saved import make_run, save, unmark, write_parts
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


def start_at(recipe, asked=NEWEST):
    """(state, step, is_chosen) of the start."""
    start = find_start(recipe, Resume(asked))
    return start.state, start.checkpoint and start.checkpoint.step, start.is_chosen


def refusal(recipe, asked=NEWEST):
    with pytest.raises(UserError) as caught:
        find_start(recipe, Resume(str(asked)))
    return caught.value


# In the run folder of the recipe


def test_auto_starts_a_new_run_where_there_is_none(tmp_path):
    recipe = load(tmp_path)
    assert find_start(recipe, Resume(IF_ANY)) == Start()
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True)
    for name in ("slurm-17.out", "submit.sbatch", ".lock"):  # of the job that is to run there
        (folder / name).touch()
    assert find_start(recipe, Resume(IF_ANY)).state == "new"


def test_resuming_where_there_is_no_run_is_refused(tmp_path):
    error = refusal(load(tmp_path))
    assert (error.what, error.where) == ("there is no run in runs/mine to resume", "--resume")
    assert "--resume auto" in error.fix and "output_dir" in error.fix
    assert refusal(load(tmp_path), "runs/mine").what == error.what  # by its path, too


@pytest.mark.parametrize("asked", [NEWEST, IF_ANY, "runs/mine", "runs/mine/"])
def test_the_newest_whole_one_is_gone_on_from(tmp_path, asked):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10, 20)
    assert start_at(recipe, asked) == ("resumed", 20, False)
    assert find_start(recipe, Resume(asked)).source == folder


@pytest.mark.parametrize("steps", [(), (10,)])
def test_of_a_finished_run_there_is_nothing_to_resume(tmp_path, steps):
    recipe = load(tmp_path)
    folder = make_run(recipe, *steps, finished=True)
    assert find_start(recipe, Resume(NEWEST)) == Start("finished", source=folder, dtype="bfloat16")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(tmp_path, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    recipe = load(tmp_path)
    folder = make_run(recipe)
    write_parts(folder, 10)
    assert find_start(recipe, Resume(NEWEST)) == Start("resumed", None, folder, dtype="bfloat16")
    assert ("runs/mine was stopped before its first" in capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize("asked", [NEWEST, IF_ANY])
def test_a_folder_of_something_else_is_no_run(tmp_path, asked):
    recipe = load(tmp_path)
    Path(recipe.output_dir).mkdir(parents=True)
    (Path(recipe.output_dir) / "thesis.tex").touch()
    error = refusal(recipe, asked)
    assert error.what == "runs/mine is not a run folder: it has no recipe.yaml"


def test_checkpoints_of_another_run_are_not_gone_on_from(tmp_path, capsys):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10)
    save(folder, 20, run_id="other")
    assert start_at(recipe) == ("resumed", 10, False)
    assert "step_000020: it is of another run" in capsys.readouterr().out


# By a path


def test_a_named_checkpoint_is_chosen(tmp_path):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10, 20)
    assert start_at(recipe, str(folder_of(folder, 20))) == ("resumed", 20, True)
    assert start_at(recipe, str(folder_of(folder, 20).absolute())) == ("resumed", 20, True)


def test_a_named_checkpoint_that_does_not_count_is_refused(tmp_path):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10, 20)
    path = unmark(folder_of(folder, 20))
    error = refusal(recipe, path)
    assert error.what.startswith(f"cannot resume from {path}: its save did not come to its end")
    assert error.fix == f"take the newest complete one: --resume {folder.absolute()}"


def test_a_named_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10)
    error = refusal(recipe, folder_of(folder, 100))
    assert "its save" not in error.what and "no" in error.what


def test_newer_ones_than_the_named_one_are_not_overwritten(tmp_path):
    recipe = load(tmp_path)
    folder = make_run(recipe, 10, 20, 30)
    error = refusal(recipe, folder_of(folder, 10))
    assert error.what.endswith("has newer checkpoints than step_000010")
    assert "output_dir=" in error.fix and f"rm -r {folder_of(folder, 30).absolute()}" in error.fix


@pytest.mark.parametrize("asked", ["runs/mien", "runs", "runs/mine/checkpoints", "/nowhere/at/all"])
def test_a_path_that_is_no_run_is_refused(tmp_path, asked):
    recipe = load(tmp_path)
    make_run(recipe, 10)
    error = refusal(recipe, asked)
    assert error.what == f"{asked} is neither a run folder nor a checkpoint of one"
    assert "name a run folder, or a checkpoint" in error.fix
    with pytest.raises(UserError, match="neither a run folder"):  # without a recipe, too
        recipe_to_resume(Resume(asked), [])


# Another run folder: a branch


def fork(tmp_path, *steps):
    """The folder of an older run, and the recipe of one that branches off."""
    return make_run(load(tmp_path), *steps), load(tmp_path, "", "output_dir=runs/branch")


def test_a_run_branches_off_from_another(tmp_path, capsys):
    source, recipe = fork(tmp_path, 10, 20)
    assert start_at(recipe, str(source)) == ("resumed", 20, False)
    assert start_at(recipe, str(folder_of(source, 10))) == ("resumed", 10, True)
    assert find_start(recipe, Resume(str(source))).source == source
    assert capsys.readouterr().out == ""  # that the folder is another is no news


def test_a_branch_starts_in_a_folder_of_its_own(tmp_path):
    source, recipe = fork(tmp_path, 10)
    Path("runs/branch").mkdir()
    Path("runs/branch/slurm-3.out").touch()
    assert start_at(recipe, str(source)) == ("resumed", 10, False)
    Path("runs/branch/run.json").write_text("{}")
    for asked in (source, folder_of(source, 10)):
        error = refusal(recipe, asked)
        assert (error.what, error.where) == ("the run folder runs/branch is not empty", "output_dir")


def test_of_a_run_without_checkpoints_nothing_branches_off(tmp_path):
    source, recipe = fork(tmp_path)
    error = refusal(recipe, source)
    assert (error.what, error.fix) == ("runs/mine has no checkpoint", "start it anew, without --resume")


# The recipe of a named run


def test_a_path_says_the_recipe(tmp_path):
    recipe = load(tmp_path, "", "seed=3", "train.steps=40", "output_dir=runs/first")
    folder = make_run(recipe, 10)
    for path in (folder, folder_of(folder, 10)):
        found = recipe_to_resume(Resume(str(path)), [])
        assert Path(found.output_dir).absolute() == folder.absolute() and found.name == "first"
        exclude = {"name", "output_dir"}
        assert found.model_dump(exclude=exclude) == recipe.model_dump(exclude=exclude)
        assert find_start(found, Resume(str(path))).checkpoint.step == 10


def test_a_run_folder_that_was_moved_is_the_run_folder(tmp_path):
    make_run(load(tmp_path), 10).rename("moved")
    found = recipe_to_resume(Resume("moved"), [])
    assert (found.output_dir, found.name) == ("moved", "moved")
    assert start_at(found, "moved") == ("resumed", 10, False)


@pytest.mark.parametrize("name", ["4711", "2026-01-31", "1e3", "null", "yes", "a b", "a: b", "a #1", "[a]"])
def test_a_run_folder_may_have_any_name(tmp_path, name):
    make_run(load(tmp_path), 10).rename(name)
    assert recipe_to_resume(Resume(name), []).output_dir == name


def test_overrides_and_consented_changes_are_in_the_recipe(tmp_path):
    folder = make_run(load(tmp_path), 10)
    resume = Resume(str(folder), ("data.path=other.jsonl",))
    recipe = recipe_to_resume(resume, ["output_dir=runs/branch", "train.keep_last=5"])
    assert (recipe.output_dir, recipe.train.keep_last) == ("runs/branch", 5)
    assert recipe.data.path == "other.jsonl"


def test_the_way_on_after_a_failure(tmp_path):
    folder = make_run(load(tmp_path))
    assert "--resume auto" in resume_hint(folder)
    save(folder, 10)
    unmark(save(folder, 20))
    hint = resume_hint(folder)
    assert str(folder_of(folder, 10)) in hint and hint.endswith(f"--resume {folder}")
