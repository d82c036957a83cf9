"""Scores from real results of lm-eval, and score files: which of them still hold."""

import json
from types import SimpleNamespace

import pytest
import tiny as made
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import EvalJob, jobs_of
from speft_ds.evaluation.results import Scored, asked, check_scores, keep_scores, scores_of, still_to_score
from speft_ds.evaluation.scores import ScoreFile
from speft_ds.evaluation.tasks import find_tasks


class Guess(LM):
    """Finds the first choice likely on even documents, and says nothing."""

    def loglikelihood(self, requests):
        return [(-1.0 if (each.doc_id % 2 == 0) == (each.idx == 0) else -2.0, False) for each in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return [""] * len(requests)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a group of two tasks, and a task with two filters."""
    folder = tmp_path_factory.mktemp("tasks")
    tasks, names = made.make_task(folder, made.make_data(folder)), ["tiny_group", "tiny_generate"]
    return simple_evaluate(Guess(), tasks=names, limit=10, task_manager=find_tasks(names, str(tasks)))


def test_a_score_per_metric_with_its_error_and_documents(results):
    scores = {(score.task, score.metric): score for score in scores_of(results, ["tiny_generate"])}
    choice, group = scores["tiny_choice", "acc"], scores["tiny_group", "acc"]
    assert (choice.value, choice.num_documents, choice.num_fewshot) == (0.5, 10, 0)
    assert choice.stderr == pytest.approx((0.25 / 9) ** 0.5)
    assert (choice.group, choice.is_group, choice.role) == ("tiny_group", False, "task")
    assert (group.group, group.is_group, group.num_documents) == (None, True, 20)
    assert scores["tiny_generate", "exact_match"].role == "forgetting"
    main = ScoreFile(label="before", model="base", kind="main", scores=scores_of(results)).main_scores()
    assert [score.task for score in main] == ["tiny_generate", "tiny_group"]


def test_the_parts_of_a_forgetting_group_are_of_that_role(results):
    roles = {score.task: score.role for score in scores_of(results, ["tiny_group"])}
    parts = dict.fromkeys(("tiny_choice", "tiny_letters", "tiny_group"), "forgetting")
    assert roles == {**parts, "tiny_generate": "task"}


def test_the_parts_of_a_group_without_a_score_stand_for_themselves(results):
    own = {**results, "results": {k: v for k, v in results["results"].items() if k != "tiny_group"}}
    scores = scores_of(own, ["tiny_group"])
    assert {score.group for score in scores} == {None}
    assert {s.task for s in scores if s.role == "forgetting"} == {"tiny_choice", "tiny_letters"}


def test_few_shot_scores_that_are_none_are_left_out_and_noted(results):
    scores = scores_of(results)
    kept, notes = check_scores(scores, EvalJob("before-4shot", "fewshot", ("tiny_generate",), 4, None), {})
    assert kept == [] and {note.partition(":")[0] for note in notes} == {score.task for score in scores}
    kept, notes = check_scores(scores, EvalJob("before", "main", ("tiny_generate",), 4, None), {})
    assert kept == scores and len(notes) == 4


def test_a_format_that_changed_no_prompt_is_no_format(results):
    job = EvalJob("before-format-1", "format", ("tiny_group", "tiny_generate"), None, None, format=1)
    kept, notes = check_scores(scores_of(results), job, {"tiny_letters": 40})
    assert {score.task for score in kept} == {"tiny_letters", "tiny_group"}
    assert [note.partition(":")[0] for note in notes] == ["tiny_choice", "tiny_generate"]


# Score files

OF = {"fingerprint": "a", "adapter": None}
ALL = {"manual_fewshot": [1, 4], "format_spread": 2}
LABELS = ["before", "before-1shot", "before-4shot", "before-format-1"]


def recipe_with(**section):
    return Recipe.model_validate({"model": {"name_or_path": "x"}, "eval": {"tasks": ["quiz"], **section}})


@pytest.fixture
def scored(tmp_path):
    """A folder with the scores of every job of a recipe, and the function that looks for jobs left to run."""
    recipe = recipe_with(**ALL)
    for job in jobs_of(recipe.eval, "before"):
        facts = {"model": "base", "asked": asked(job, OF, recipe), "scores": []}
        file = ScoreFile(label=job.label, kind=job.kind, **facts)
        keep_scores(tmp_path, Scored(file, {"samples": {"quiz": [{"doc_id": 0}]}}), recipe.eval)

    def left(of=OF, **section):
        recipe = recipe_with(**section)
        jobs = jobs_of(recipe.eval, "before")
        return [job.label for job in still_to_score(tmp_path, "before", jobs, of, recipe)]

    return SimpleNamespace(left=left, folder=tmp_path)


def labels(folder):
    return sorted(path.stem for path in folder.glob("*.json"))


@pytest.mark.parametrize("change", [{"limit": 5}, {"num_fewshot": 1}, {"chat_template": False}])
def test_scores_that_were_made_otherwise_are_set_aside(scored, change):
    assert "before" in scored.left(**ALL, **change)
    assert (scored.folder / "old" / "before" / "quiz.jsonl").is_file()
    assert not (scored.folder / "before").exists() and "before" in labels(scored.folder / "old")


def test_what_was_scored_is_not_scored_again_unless_the_weights_are_others(scored):
    assert scored.left(**ALL) == [] and labels(scored.folder) == LABELS
    assert scored.left(manual_fewshot=[4]) == []  # what is not asked for any more is set aside
    assert labels(scored.folder) == ["before", "before-4shot"]
    assert scored.left({"fingerprint": "b", "adapter": None}, **ALL) == LABELS
    assert labels(scored.folder) == []


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_file_is_made_again(scored, text):
    (scored.folder / "before.json").write_text(text)
    assert scored.left(**ALL) == ["before"]


def test_documents_of_an_earlier_evaluation_do_not_stay(scored):
    file = ScoreFile(label="before", model="tuned", kind="main", scores=[])
    keep_scores(scored.folder, Scored(file, {"samples": {"other": []}}), recipe_with().eval)
    assert [path.name for path in (scored.folder / "before").iterdir()] == ["other.jsonl"]
    assert json.loads((scored.folder / "before.json").read_text()) == file.model_dump()
