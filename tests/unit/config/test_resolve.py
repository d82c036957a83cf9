"""What a job makes of a recipe: its run folder, its micro-batch."""

import pytest

from speft_ds.config.recipe import resolve
from speft_ds.config.train_config import TrainConfig
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("text", ["", "output_dir: null"])
def test_scoring_has_a_run_folder_of_its_own(tmp_path, text):
    recipe = load(tmp_path, text, "mask.salience=snip")
    scoring = resolve(recipe, job="score", world_size=2)
    assert scoring.output_dir == "runs/mine-score-snip" and recipe.output_dir == "runs/mine"
    assert scoring.where("output_dir") == "output_dir (default)"
    assert scoring.where("mask.salience") == recipe.where("mask.salience")
    assert scoring.model_copy(update={"output_dir": recipe.output_dir}) == recipe


@pytest.mark.parametrize(("text", "overrides"), [("", ["output_dir=here"]), ("output_dir: here", [])])
def test_scoring_keeps_a_chosen_run_folder(tmp_path, text, overrides):
    assert resolve(load(tmp_path, text, *overrides), job="score", world_size=1).output_dir == "here"


def test_a_resumed_run_has_a_micro_batch_that_its_ranks_share(tmp_path):
    """The largest part of the old one of which every rank takes as many; else it stays."""
    recipe = load(tmp_path)
    for batch in range(1, 25):
        for micro in [m for m in range(1, batch + 1) if batch % m == 0]:
            given = recipe.model_copy(update={"train": TrainConfig(global_batch=batch, micro_batch=micro)})
            for world_size in range(1, 13):
                resumed = resolve(given, job="train", world_size=world_size, fits_micro_batch=True)
                fits = [m for m in range(1, micro + 1) if micro % m == 0 and batch % (m * world_size) == 0]
                train = given.train.model_copy(update={"micro_batch": max(fits, default=micro)})
                assert resumed == given.model_copy(update={"train": train})


@pytest.mark.parametrize("job", ["train", "score", "evaluate"])
def test_nothing_else_is_changed(tmp_path, job):
    recipe = load(tmp_path, "", "output_dir=here")
    assert resolve(recipe, job=job, world_size=7) is recipe
