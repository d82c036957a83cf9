"""What is kept of lm-eval's results: real ones, of a group and of a task with two filters."""

import pytest
import tiny as made
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from speft_ds.evaluation.eval_jobs import EvalJob
from speft_ds.evaluation.scores import check_rows, main_scores, score_rows
from speft_ds.evaluation.tasks import find_tasks


class Guess(LM):
    """Finds the first choice likely on even documents, and says nothing."""

    def loglikelihood(self, requests):
        return [
            (-1.0 if (request.doc_id % 2 == 0) == (request.idx == 0) else -2.0, False) for request in requests
        ]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        return ["" for _ in requests]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = made.make_task(folder, made.make_data(folder))
    names = ["tiny_group", "tiny_generate"]
    return simple_evaluate(Guess(), tasks=names, limit=10, task_manager=find_tasks(names, str(tasks)))


def test_a_row_a_metric_with_its_error_and_documents(results):
    rows = {(row["task"], row["metric"]): row for row in score_rows(results, ["tiny_generate"])}
    choice = rows["tiny_choice", "acc"]
    assert choice["value"] == 0.5 and choice["num_documents"] == 10 and choice["num_fewshot"] == 0
    assert choice["stderr"] == pytest.approx((0.25 / 9) ** 0.5)
    assert choice["group"] == "tiny_group" and not choice["is_group"] and choice["role"] == "task"
    group = rows["tiny_group", "acc"]
    assert group["is_group"] and group["num_documents"] == 20 and group["group"] is None
    assert rows["tiny_generate", "exact_match"]["role"] == "forgetting"


def test_the_parts_of_a_forgetting_group_are_of_that_role(results):
    roles = {row["task"]: row["role"] for row in score_rows(results, ["tiny_group"])}
    assert roles["tiny_choice"] == roles["tiny_letters"] == roles["tiny_group"] == "forgetting"
    assert roles["tiny_generate"] == "task"


def test_a_group_without_a_score_leaves_its_parts_to_themselves(results):
    own = {**results, "results": {k: v for k, v in results["results"].items() if k != "tiny_group"}}
    rows = score_rows(own, ["tiny_group"])
    assert {row["group"] for row in rows} == {None}
    assert {row["task"] for row in rows if row["role"] == "forgetting"} == {"tiny_choice", "tiny_letters"}


def test_main_scores_are_those_of_groups(results):
    document = {"label": "before", "model": "base", "kind": "main", "scores": score_rows(results)}
    assert [score.task for score in main_scores(document)] == ["tiny_generate", "tiny_group"]


def test_few_shot_scores_that_are_none_are_left_out_and_said(results):
    rows = score_rows(results)
    kept, notes = check_rows(rows, EvalJob("before-4shot", "fewshot", ("tiny_generate",), 4, None), {})
    assert kept == [] and "tiny_generate: scored with 0 examples, not 4: its file says so" in notes
    kept, notes = check_rows(rows, EvalJob("before", "main", ("tiny_generate",), 4, None), {})
    assert kept == rows and len(notes) == 4


def test_a_format_that_changed_no_prompt_is_no_format(results):
    round = EvalJob("before-format-1", "format", ("tiny_group", "tiny_generate"), None, None, format=1)
    kept, notes = check_rows(score_rows(results), round, {"tiny_letters": 40})
    assert {row["task"] for row in kept} == {"tiny_letters", "tiny_group"}
    assert [note.split(":")[0] for note in notes] == ["tiny_choice", "tiny_generate"]
