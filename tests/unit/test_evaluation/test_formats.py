"""Equivalent prompt formats: what they change, and what they leave alone."""

import pytest

from speft_ds.evaluation.formats import PromptFormat, prompt_formats

PROMPT = "Question: What is 1:2?\nAnswer: half\n\nQuestion: Why: so?\nFinal Answer:"


def test_descriptors_are_rewritten_and_nothing_else():
    written = PromptFormat(str.upper, " -", "\n").rewrite(PROMPT)
    assert written == "QUESTION - What is 1:2?\nANSWER - half\n\nQUESTION - Why: so?\nFINAL ANSWER -"


def test_fields_get_lines_of_their_own():
    written = PromptFormat(str, ":", "\n\n").rewrite("Text: a\nb\nLabel:")
    assert written == "Text: a\nb\n\nLabel:"


@pytest.mark.parametrize("prompt", ["", "say cat please", "see http://a: b\n- x: y", "{'Key': 1}"])
def test_a_prompt_without_descriptors_stays(prompt):
    assert all(way.rewrite(prompt) == prompt for way in prompt_formats(40, 0)[1:])


def test_formats_are_different_and_drawn_by_the_seed():
    ways = prompt_formats(20, seed=1)
    assert ways[0] is None and len({way.rewrite(PROMPT) for way in ways[1:]} | {PROMPT}) == 20
    assert ways == prompt_formats(20, seed=1) != prompt_formats(20, seed=2)
    assert prompt_formats(5, seed=1) == ways[:5]  # more of them keep the first


def test_every_format_keeps_every_word():
    words = PROMPT.lower().replace(":", " ").split()
    for way in prompt_formats(50, 3)[1:]:
        left = way.rewrite(PROMPT).lower()
        assert [word for word in words if word not in left] == []
