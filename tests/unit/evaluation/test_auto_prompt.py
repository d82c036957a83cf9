"""The search for a prompt: on synthetic measures, within its budget, without a row as its own example."""

import pytest

from speft_ds.evaluation.auto_prompt import TEMPLATES, LabelledRow, Prompt, label_words, search

ROWS = [LabelledRow(f"text {n}", ("bad", "good"), n % 2) for n in range(6)]
COST = 2 * len(ROWS)


def test_a_prompt_is_examples_and_a_question_in_one_form():
    prompt = Prompt("Choose one of: {words}.\nText: {text}\nLabel:", ("no", "yes"), (3, 0))
    question = "Choose one of: no, yes.\nText: {}\nLabel:"
    shown = [question.format("text 3") + " yes", question.format("text 0") + " no"]
    assert prompt.write(ROWS[1], ROWS) == "\n\n".join([*shown, question.format("text 1")])
    assert prompt.write(ROWS[3], ROWS) == "\n\n".join([shown[1], question.format("text 3")])  # not its own


def test_braces_in_a_text_are_no_fields():
    row = LabelledRow("{words} {x}", ("a", "b"), 0)
    assert Prompt("{text}\nAnswer:", None, ()).write(row, ROWS) == "{words} {x}\nAnswer:"


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_template_words_and_order(seed):
    def measure(prompt):
        good = [prompt.template == TEMPLATES[3], prompt.words == ("no", "yes"), prompt.examples[:1] == (5,)]
        return sum(good) / 3, 0.0

    found = search(ROWS, measure, 100 * COST, 3, seed)
    assert found.prompt.template == TEMPLATES[3] and found.prompt.words == ("no", "yes")
    assert found.prompt.examples[0] == 5 and found.quality == (1.0, 0.0)
    assert found == search(ROWS, measure, 100 * COST, 3, seed)


@pytest.mark.parametrize("forwards", [1, COST, 5 * COST + 3, 40 * COST])
def test_the_budget_is_kept_and_no_prompt_is_measured_twice(forwards):
    measured = []
    found = search(ROWS, lambda prompt: measured.append(prompt) or (0.5, 0.0), forwards, 4, 0)
    assert len(measured) == len(set(measured)) == found.num_prompts
    assert found.num_forwards == len(measured) * COST <= max(forwards, COST)
    assert found.prompt == measured[0]  # none is better
    assert all(len(prompt.examples) == len(set(prompt.examples)) <= 4 for prompt in measured)


def test_among_as_many_right_answers_the_likelier_ones_win():
    found = search(ROWS, lambda prompt: (0.5, -len(prompt.template)), 100 * COST, 2, 0)
    assert found.prompt.template == min(TEMPLATES, key=len)


def test_choices_of_their_own_keep_their_words():
    rows = [LabelledRow(f"text {n}", (f"a{n}", f"b{n}", "c"), 0) for n in range(5)]
    measured = []
    search(rows, lambda prompt: measured.append(prompt) or (0.0, 0.0), 3000, 2, 0)
    assert {prompt.words for prompt in measured} == {None}
    assert not any("{words}" in prompt.template for prompt in measured)


def test_label_words_are_as_many_and_differ():
    for choices in (("bad", "good"), ("World", "Sports", "Business", "Science"), ("A", "B", "C")):
        found = label_words(choices)
        assert choices not in found and len(found) == len(set(found))
        assert all(len(set(words)) == len(choices) for words in found)
    assert ("yes", "no") in label_words(("bad", "good")) and ("BAD", "GOOD") in label_words(("bad", "good"))
