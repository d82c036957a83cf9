"""What is kept of lm-eval's results: real ones, of a group and of a task with two filters."""

import json

import pytest
import tiny as made
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from speft_ds.evaluation.scores import main_scores, score_rows, write_scores
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


def test_files_of_scores_and_of_every_document(results, tmp_path):
    document = {"label": "before", "model": "base", "kind": "main", "scores": score_rows(results)}
    write_scores(tmp_path, document, results["samples"])
    assert json.loads((tmp_path / "before.json").read_text()) == document
    lines = (tmp_path / "before" / "tiny_choice.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == list(range(10))
    assert [score.task for score in main_scores(document)] == ["tiny_generate", "tiny_group"]
