"""Equivalent prompt formats: what they change, and what they leave alone."""

import pytest

from speft_ds.evaluation.eval_jobs import PromptFormat, prompt_formats

PROMPT = "Question: What is 1:2?\nAnswer: half\n\nQuestion: Why: so?\nFinal Answer:"


def test_descriptors_are_rewritten_and_nothing_else():
    rewritten = PromptFormat(str.upper, " -", "\n").rewrite(PROMPT)
    assert rewritten == "QUESTION - What is 1:2?\nANSWER - half\n\nQUESTION - Why: so?\nFINAL ANSWER -"
    assert PromptFormat(str, ":", "\n\n").rewrite("Text: a\nb\nLabel:") == "Text: a\nb\n\nLabel:"


@pytest.mark.parametrize("prompt", ["", "say cat please", "see http://a: b\n- x: y", "{'Key': 1}"])
def test_a_prompt_without_descriptors_stays(prompt):
    assert all(each.rewrite(prompt) == prompt for each in prompt_formats(40)[1:])


def test_formats_are_different_and_always_the_same_and_keep_every_word():
    formats = prompt_formats(50)
    assert formats[0] is None and prompt_formats(5) == formats[:5]  # more of them keep the first
    rewritten = [each.rewrite(PROMPT) for each in formats[1:]]
    assert len({PROMPT, *rewritten}) == 50
    words = PROMPT.lower().replace(":", " ").split()
    assert all(word in prompt.lower() for prompt in rewritten for word in words)


def test_what_ends_an_answer_is_known_in_both_forms():
    settings = {"until": ["Question:", "</s>"], "max_gen_toks": 8}
    prompt, rewritten = PromptFormat(str.upper, " -", "\n").rewrite_request((PROMPT, settings))
    assert rewritten == {"until": ["Question:", "</s>", "QUESTION -"], "max_gen_toks": 8}
    assert prompt.startswith("QUESTION - ") and settings["until"] == ["Question:", "</s>"]
