"""Score files: which of them still hold, and what becomes of the others."""

import json
from types import SimpleNamespace

import pytest

from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import jobs_of
from speft_ds.evaluation.results import asked, keep_scores, still_to_score

OF = {"fingerprint": "a", "adapter": None}


def recipe_with(**section):
    return Recipe.model_validate({"model": {"name_or_path": "x"}, "eval": {"tasks": ["quiz"], **section}})


@pytest.fixture
def scored(tmp_path):
    """A folder with every round of a recipe, and the function that looks for what is left to score."""
    made = recipe_with(manual_fewshot=[1, 4], format_spread=2)
    for round in jobs_of(made.eval, "before"):
        document = {"label": round.label, "asked": asked(round, OF, made), "scores": []}
        keep_scores(
            tmp_path, SimpleNamespace(document=document, samples={"quiz": [{"doc_id": 0}]}), made.eval
        )

    def left(recipe, of=OF):
        rounds = jobs_of(recipe.eval, "before")
        return [round.label for round in still_to_score(tmp_path, "before", rounds, of, recipe)]

    return SimpleNamespace(made=made, left=left, folder=tmp_path)


def labels(folder):
    return sorted(path.stem for path in folder.glob("*.json"))


def test_what_was_scored_is_not_scored_again(scored):
    assert scored.left(scored.made) == []
    assert labels(scored.folder) == ["before", "before-1shot", "before-4shot", "before-format-1"]


@pytest.mark.parametrize("change", [{"limit": 5}, {"num_fewshot": 1}, {"chat_template": False}])
def test_scores_that_were_made_otherwise_are_set_aside(scored, change):
    recipe = recipe_with(manual_fewshot=[1, 4], format_spread=2, **change)
    assert "before" in scored.left(recipe)
    assert (scored.folder / "old" / "before" / "quiz.jsonl").is_file()
    assert not (scored.folder / "before").exists() and "before" in labels(scored.folder / "old")


def test_scores_of_other_weights_are_set_aside(scored):
    assert len(scored.left(scored.made, {"fingerprint": "b", "adapter": None})) == 4
    assert labels(scored.folder) == []


def test_baselines_that_are_not_asked_for_any_more_are_set_aside(scored):
    assert scored.left(recipe_with(manual_fewshot=[4])) == []
    assert labels(scored.folder) == ["before", "before-4shot"]


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_file_is_made_again(scored, text):
    (scored.folder / "before.json").write_text(text)
    assert scored.left(scored.made) == ["before"]


def test_documents_of_an_earlier_scoring_do_not_stay(scored):
    document = {"label": "before", "scores": []}
    keep_scores(scored.folder, SimpleNamespace(document=document, samples={"other": []}), scored.made.eval)
    assert [path.name for path in (scored.folder / "before").iterdir()] == ["other.jsonl"]
    assert json.loads((scored.folder / "before.json").read_text()) == document
