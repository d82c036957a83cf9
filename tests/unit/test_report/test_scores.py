"""Scores read from files, and what a difference of two is worth."""

import json
import math

import pytest

from speft_ds.evaluation.scores import Change, Score, changes, read_evaluations
from unit.test_report.sample import evaluation, evaluations, score, write_json


def change(before, after, stderr=0.01, **facts):
    old, new = (Score(**score("t", value, stderr, **facts)) for value in (before, after))
    return Change(old, new)


def read(folder, **documents):
    for name, document in documents.items():
        write_json(folder / "eval" / f"{name}.json", document)
    return read_evaluations(folder)


@pytest.mark.parametrize(
    ("before", "after", "facts", "verdict", "text"),
    [
        (0.41, 0.61, {}, "better", "+20.0 points ± 1.4"),
        (0.61, 0.41, {}, "worse", "-20.0 points ± 1.4"),
        (0.41, 0.43, {}, "no clear change", "+2.0 points ± 1.4"),
        (0.41, 0.43, {"higher_is_better": False}, "no clear change", "+0.02 ± 0.014"),
        (0.9, 0.8, {"higher_is_better": False}, "better", "-0.1 ± 0.014"),
        (31.2, 30.0, {"stderr": 0.1}, "worse", "-1.2 ± 0.14"),
        (0.0, 1.0, {"stderr": 0.0}, "better", "+100.0 points ± 0.0"),  # every document changed
        (0.0, 0.0, {"stderr": 0.0}, "no clear change", "+0.0 points ± 0.0"),
        (12.0, 11.0, {"stderr": None, "higher_is_better": False}, "better", "-1"),
        (0.5, math.nan, {}, "no clear change", "+nan ± 0.014"),
        (0.5, 0.6, {"stderr": math.nan}, "better", "+10.0 points"),
    ],
)
def test_a_change_is_judged_by_its_standard_error(before, after, facts, verdict, text):
    made = change(before, after, **facts)
    assert (made.verdict, made.text) == (verdict, text)


def test_the_error_of_a_change_adds_in_squares():
    made = Change(Score(**score("t", 0.4, 0.03)), Score(**score("t", 0.5, 0.04)))
    assert made.stderr == pytest.approx(0.05) and made.num_errors == pytest.approx(2.0)
    assert made.errors_text() == "2.0 standard errors"
    assert change(0.4, 0.9).errors_text("s.e.") == "35 s.e."


def test_files_are_told_apart_by_what_they_say(tmp_path):
    found = read(tmp_path, **evaluations())
    assert found.problems == []
    assert (found.before.label, found.after.label) == ("before", "after")
    assert list(found.by_prompt()) == ["0-shot", "1-shot", "4-shot", "16-shot"]
    assert list(found.by_format("base")) == list(found.by_format("tuned")) == [0, 1, 2]
    assert [each.label for each in found.of("extra")] == ["mmlu"]
    assert [c.after.task for c in changes(found.before, found.after, "forgetting")] == ["piqa"]


def test_a_baseline_on_fewer_documents_says_how_many(tmp_path):
    files = evaluations()
    files["before-4shot"]["settings"]["limit"] = 32
    prompts = ["0-shot", "1-shot", "4-shot on 32 documents", "16-shot"]
    assert list(read(tmp_path, **files).by_prompt()) == prompts
    for document in files.values():
        document["settings"]["limit"] = 32
    assert list(read(tmp_path, **files).by_prompt()) == ["0-shot", "1-shot", "4-shot", "16-shot"]


def test_the_parts_of_a_group_are_not_named_beside_it(tmp_path):
    scores = [score("mmlu", 0.3, is_group=True), score("mmlu_law", 0.2, group="mmlu"), score("piqa", 0.6)]
    found = read(tmp_path, after=evaluation("after", "tuned", "main", scores))
    assert [each.task for each in found.after.main_scores()] == ["mmlu", "piqa"]


def test_a_tasks_own_number_of_examples_is_not_zero(tmp_path):
    own = [score("mmlu", 0.3, num_fewshot=5)]
    mixed = [*own, score("piqa", 0.6)]
    found = read(tmp_path, before=evaluation("before", "base", "main", own, num_fewshot=None))
    assert list(found.by_prompt()) == ["5-shot"]
    found = read(tmp_path, before=evaluation("before", "base", "main", mixed, num_fewshot=None))
    assert list(found.by_prompt()) == ["own prompts"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"results": {"arc": {"acc,none": 0.5}}}', "was scored by an older version"),
        ('{"label": "after", "model"', "cannot be read"),
        ("[1, 2]", "is not understood"),
        (json.dumps(evaluation("after", "other", "main", [])), "is not understood: model"),
        (json.dumps(evaluation("after", "tuned", "main", [{"task": "t"}])), "is not understood: scores.0"),
        (json.dumps(evaluation("after", "tuned", "main", [score("t", "0.5")])), "scores.0.value"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_problem_in_words(tmp_path, content, said):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "after.json").write_text(content)
    found = read_evaluations(tmp_path)
    assert found.all == [] and len(found.problems) == 1 and said in found.problems[0]


def test_documents_beside_the_scores_are_not_scores(tmp_path):
    (tmp_path / "eval" / "before").mkdir(parents=True)
    (tmp_path / "eval" / "before" / "arc.jsonl").write_text("{}\n")
    (tmp_path / "eval" / "before" / "arc.json").write_text("{}\n")
    assert read_evaluations(tmp_path).problems == []
