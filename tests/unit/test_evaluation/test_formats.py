"""Equivalent prompt formats: what they change, and what they leave alone."""

import pytest

from speft_ds.evaluation.prompt_formats import PromptFormat, prompt_formats

PROMPT = "Question: What is 1:2?\nAnswer: half\n\nQuestion: Why: so?\nFinal Answer:"


def test_descriptors_are_rewritten_and_nothing_else():
    written = PromptFormat(str.upper, " -", "\n").rewrite(PROMPT)
    assert written == "QUESTION - What is 1:2?\nANSWER - half\n\nQUESTION - Why: so?\nFINAL ANSWER -"


def test_fields_get_lines_of_their_own():
    written = PromptFormat(str, ":", "\n\n").rewrite("Text: a\nb\nLabel:")
    assert written == "Text: a\nb\n\nLabel:"


@pytest.mark.parametrize("prompt", ["", "say cat please", "see http://a: b\n- x: y", "{'Key': 1}"])
def test_a_prompt_without_descriptors_stays(prompt):
    assert all(way.rewrite(prompt) == prompt for way in prompt_formats(40)[1:])


def test_formats_are_different_and_always_the_same():
    ways = prompt_formats(20)
    assert ways[0] is None and len({way.rewrite(PROMPT) for way in ways[1:]} | {PROMPT}) == 20
    assert ways == prompt_formats(20) and prompt_formats(5) == ways[:5]  # more of them keep the first


def test_what_ends_an_answer_is_known_in_both_forms():
    settings = {"until": ["Question:", "</s>"], "max_gen_toks": 8}
    prompt, rewritten = PromptFormat(str.upper, " -", "\n").rewrite_request((PROMPT, settings))
    assert rewritten == {"until": ["Question:", "</s>", "QUESTION -"], "max_gen_toks": 8}
    assert prompt.startswith("QUESTION - ") and settings["until"] == ["Question:", "</s>"]


def test_every_format_keeps_every_word():
    words = PROMPT.lower().replace(":", " ").split()
    for way in prompt_formats(50)[1:]:
        left = way.rewrite(PROMPT).lower()
        assert [word for word in words if word not in left] == []
