"""Scores read from files, and what a difference of two is worth."""

import json
import math

import pytest

from speft_ds.evaluation.scores import Perplexity, Score, ScoreChange, card_scores, read_evaluations
from unit.report.sample import evaluation, evaluations, score, write_json


def read(folder, **documents):
    for name, document in documents.items():
        write_json(folder / "eval" / f"{name}.json", document)
    return read_evaluations(folder)


@pytest.mark.parametrize(
    ("before", "after", "facts", "verdict", "text"),
    [
        (0.41, 0.61, {}, "better, 14 s.e.", "+20.0 points ± 1.4"),
        (0.61, 0.41, {}, "worse, 14 s.e.", "-20.0 points ± 1.4"),
        (0.41, 0.43, {}, "no clear change, 1.4 s.e.", "+2.0 points ± 1.4"),
        (0.41, 0.43, {"higher_is_better": False}, "no clear change, 1.4 s.e.", "+0.020 ± 0.014"),
        (0.9, 0.8, {"higher_is_better": False}, "better, 7.1 s.e.", "-0.100 ± 0.014"),
        (31.2, 30.0, {"stderr": 0.1}, "worse, 8.5 s.e.", "-1.20 ± 0.14"),
        (0.0, 1.0, {"stderr": 0.0}, "better, no standard error", "+100.0 points ± 0.0"),  # all changed
        (0.0, 0.0, {"stderr": 0.0}, "no clear change, no standard error", "+0.0 points ± 0.0"),
        (12.0, 11.0, {"stderr": None, "higher_is_better": False}, "better, no standard error", "-1"),
        (0.5, math.nan, {}, "no clear change, no standard error", "+nan ± 0.014"),
        (0.5, 0.6, {"stderr": math.nan}, "better, no standard error", "+10.0 points"),
    ],
)
def test_a_change_is_judged_by_its_standard_error(before, after, facts, verdict, text):
    facts = {"stderr": 0.01, **facts}
    made = ScoreChange(Score(**score("t", before, **facts)), Score(**score("t", after, **facts)))
    assert (made.verdict_text, str(made)) == (verdict, text)


def test_the_error_of_a_change_adds_in_squares():
    made = ScoreChange(Score(**score("t", 0.4, 0.03)), Score(**score("t", 0.5, 0.04)))
    assert made.stderr == pytest.approx(0.05) and made.num_errors == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ({"token_perplexity": 9.0}, True),
        ({"text": "/data/general.txt"}, True),  # as another command line names it
        ({"text": "wiki.txt"}, False),
        ({"num_bytes": 1000}, False),
        ({"num_tokens": 300}, False),
    ],
)
def test_perplexities_are_compared_if_they_are_of_one_text(tmp_path, other, is_same):
    of = {"text": "general.txt", "num_bytes": 2000, "num_tokens": 600}
    of |= {"token_perplexity": 12.0, "byte_perplexity": 2.0}
    texts = {"before": of, "after": of | other}
    assert Perplexity(**of).is_of_same_text(Perplexity(**texts["after"])) == is_same
    models = {"before": "base", "after": "tuned"}
    files = {label: evaluation(label, models[label], "main", [], text) for label, text in texts.items()}
    before, after = read(tmp_path, **files).perplexities
    assert after.text == texts["after"]["text"] and (before is not None) == is_same


def test_files_are_told_apart_by_what_they_say(tmp_path):
    write_json(tmp_path / "eval" / "before" / "arc.json", {})  # documents beside the scores are not scores
    found = read(tmp_path, **evaluations())
    assert found.problems == []
    assert (found.before.label, found.after.label) == ("before", "after")
    assert list(found.by_prompt()) == ["0-shot", "1-shot", "4-shot", "16-shot"]
    assert list(found.by_format("base")) == list(found.by_format("tuned")) == [0, 1, 2]
    assert [each.label for each in found.of("extra")] == ["mmlu"]
    assert [c.after.task for c in found.changes("forgetting")] == ["piqa"]
    of_tasks = [s.task for s in found.after.main_scores()]
    assert [row["task"] for row in card_scores(tmp_path)] == [*of_tasks, "piqa"]
    arc = {"before": "41.0% ± 2.2", "after": "61.0% ± 2.2", "value": 0.41 + 0.2, "documents": 500}
    assert arc.items() <= card_scores(tmp_path)[0].items()
    assert card_scores(tmp_path)[1]["metric"] == "exact_match (strict-match)"


def test_a_baseline_on_fewer_documents_says_how_many(tmp_path):
    files = evaluations()
    files["before-4shot"]["settings"]["limit"] = 32
    prompts = ["0-shot", "1-shot", "4-shot on 32 documents", "16-shot"]
    assert list(read(tmp_path, **files).by_prompt()) == prompts
    for document in files.values():
        document["settings"]["limit"] = 32
    assert list(read(tmp_path, **files).by_prompt()) == ["0-shot", "1-shot", "4-shot", "16-shot"]


def test_the_parts_of_a_group_are_not_named_and_own_numbers_of_examples_are_not_zero(tmp_path):
    mmlu = score("mmlu", 0.3, is_group=True, num_fewshot=5)
    part = score("mmlu_law", 0.2, group="mmlu", num_fewshot=5)
    for scores, prompt in (([mmlu], "5-shot"), ([mmlu, score("piqa", 0.6)], "own prompts")):
        found = read(tmp_path, before=evaluation("before", "base", "main", [*scores, part], num_fewshot=None))
        assert found.main_scores() == [Score(**each) for each in scores]
        assert list(found.by_prompt()) == [prompt]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"results": {"arc": {"acc,none": 0.5}}}', "label"),  # lm-eval's own form
        ('{"label": "after", "model"', ""),
        ("[" * 100_000, ""),
        (r'{"label": "\ud800"}', ""),
        ("[1, 2]", ""),
        (json.dumps(evaluation("after", "other", "main", [])), "model"),
        (json.dumps(evaluation("after", "tuned", "main", [{"task": "t"}])), "scores.0"),
        (json.dumps(evaluation("after", "tuned", "main", [score("t", "0.5")])), "scores.0.value"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_problem_that_names_it(tmp_path, content, where):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "after.json").write_text(content)
    found = read_evaluations(tmp_path)
    assert found.all == [] and len(found.problems) == 1
    assert found.problems[0].startswith("eval/after.json ") and where in found.problems[0]
