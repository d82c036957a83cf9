"""Scores from real results of lm-eval, and score files: which of them still hold."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import tiny as made
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import EvalJob, jobs_of
from speft_ds.evaluation.results import Scored, asked, check_scores, keep_scores, scores_of, still_to_score
from speft_ds.evaluation.samples import MAX_TEXT, read_answers
from speft_ds.evaluation.scores import Evaluations, Score, ScoreFile, read_evaluations
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


# Documents


def document(number, value, answer="an answer", **changes):
    """A line as lm-eval writes it of a task that generates."""
    known = {"doc_id": number, "filter": "none", "metrics": ["acc"], "doc_hash": f"hash of {number}"}
    texts = {"target": "expected", "arguments": [["a prompt", {"until": []}]], "resps": [[answer]]}
    return {**known, **texts, "acc": value, **changes}


def kept(run, before, after, task="quiz", **score):
    """The answers that can be read of a run with these documents of a task, dicts or raw lines."""
    for label, model, lines in (("before", "base", before), ("after", "tuned", after)):
        scores = [Score(task=task, metric="acc", value=0.5, **score)]
        file = ScoreFile(label=label, model=model, kind="main", scores=scores)
        keep_scores(run / "eval", Scored(file, {"samples": {"quiz": []}}), recipe_with().eval)
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (run / "eval" / label / "quiz.jsonl").write_bytes(b"\n".join(raw))
    return read_answers(run, read_evaluations(run))


def test_answers_of_real_results_before_and_after(results, tmp_path):
    """Against a plain count; a model that answers all anew flips every document that has a right or wrong."""
    flipped = copy.deepcopy(results)
    for row in flipped["samples"]["tiny_letters"]:
        row["acc"] = 1 - row["acc"]
    for label, model, found in (("before", "base", results), ("after", "tuned", flipped)):
        file = ScoreFile(label=label, model=model, kind="main", scores=scores_of(found))
        keep_scores(tmp_path / "eval", Scored(file, found), recipe_with().eval)
    tasks, others = read_answers(tmp_path, read_evaluations(tmp_path))
    assert others == [] and tasks[0].name == "tiny_letters acc"
    right = sum(row["acc"] for row in results["samples"]["tiny_letters"])
    assert tasks[0].counts == {"better": 10 - right, "worse": right, "same": 0} and 0 < right < 10
    assert all(sum(task.counts.values()) == 10 for task in tasks)
    (_, even, _), (_, odd, _) = [each for each in tasks[0].shown if each[1].document in (0, 1)]
    assert {even.answer, odd.answer} == {"a", "b"} and even.expected == "a"  # the likeliest of the choices
    assert even.prompt.endswith("Answer:") and "say ant" in {even.document: even, odd.document: odd}[0].prompt
    generated = next(task for task in tasks if task.name.startswith("tiny_generate"))
    assert generated.shown[0][1].expected == "ant 0" and generated.shown[0][2].answer == ""


def test_few_documents_of_each_kind_are_shown_and_all_are_counted(tmp_path):
    values = [(0, 1)] * 5 + [(1, 0)] * 3 + [(1, 1)] * 4
    before, after = ([document(n, pair[side]) for n, pair in enumerate(values)] for side in (0, 1))
    (task,), _ = kept(tmp_path, before, after)
    assert task.counts == {"better": 5, "worse": 3, "same": 4} and task.is_right_or_wrong
    assert [(kind, old.document) for kind, old, _ in task.shown] == [
        ("better", 0), ("better", 1), ("worse", 5), ("worse", 6), ("same", 8),
    ]  # fmt: skip
    (task,), _ = kept(tmp_path, before, after, higher_is_better=False)
    assert task.counts == {"better": 3, "worse": 5, "same": 4}
    (task,), _ = kept(tmp_path, [document(0, 0.25)], [document(0, 0.5)])
    assert task.counts["better"] == 1 and not task.is_right_or_wrong


def test_texts_are_cut(tmp_path):
    long = document(0, 0, "x" * 10_000, arguments=[["y" * 10_000 + "?", {}]], target="z" * 10_000)
    (task,), _ = kept(tmp_path, [long], [document(0, 1)])
    _, before, _ = task.shown[0]
    assert before.prompt.endswith("y?") and before.answer.startswith("x") and before.expected.startswith("z")
    assert max(map(len, (before.prompt, before.answer, before.expected))) <= MAX_TEXT + 2


@pytest.mark.parametrize(
    "odd",
    [
        b"", b"{", b"[1]", b"\x00\xff", b'{"a": ' * 2000, b'"' + b"x" * (2**20 + 9) + b'"',
        document(1, None), document(1, [0.5, 3]), document(1, "1"), document(1, 10**400), document(True, 1),
        document([], 1), document(1, 1, filter="other"), document(1, 1, doc_hash="of another"),
        document(1, 1, arguments=7, resps={}, target=None, doc_hash=None), {},
    ],
)  # fmt: skip
def test_odd_documents_are_left_out(tmp_path, odd):
    """Of a task, and with them no other: what is there before and after is compared."""
    good = [document(0, 0), document(2, 0)]
    (task,), _ = kept(tmp_path, [good[0], document(1, 0), good[1]], [good[0], odd, good[1]])
    assert sum(task.counts.values()) == 2


def test_documents_are_read_from_the_run_alone(tmp_path):
    secret = tmp_path / "secret.jsonl"
    for task in ("../../../secret", str(secret.with_suffix("")), "sub/quiz", ".."):
        secret.write_text(json.dumps(document(0, 1)))
        tasks, others = kept(tmp_path / "run", [document(0, 0)], [document(0, 1)], task=task)
        assert tasks == [] and others == [f"{task} acc"]
    run = tmp_path / "run"
    (run / "eval" / "after" / "quiz.jsonl").unlink()
    os.mkfifo(run / "eval" / "after" / "quiz.jsonl")  # a pipe would keep us waiting
    score = Score(task="quiz", metric="acc", value=0.5)
    file = ScoreFile(label="after", model="tuned", kind="main", scores=[score])
    found = Evaluations([file.model_copy(update={"label": "before", "model": "base"}), file], [])
    assert read_answers(run, found) == ([], ["quiz acc"])
