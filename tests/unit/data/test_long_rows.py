"""Rows that are too long, cut or left out; most have one token per byte."""

import pytest
import tiny

from speft_ds.data.tokenize import CUT_PROMPT, CUT_RESPONSE, TOO_LONG
from unit.data.made import chat, encode, plain, responses

LONG, SHORT = "abcdefghijklmnopqrstuvwxyz", "0123456789"
TOKENIZER = tiny.make_tokenizer()
POLICIES = ("drop", "truncate_prompt", "truncate_response")
TEXT = chat([("assistant", LONG)], is_chat=False)
TO_CLASSIFY = chat([("user", LONG)], is_chat=False, label=1)


def cut(example, max_length, long_rows):
    """The row as text, its label tokens as text, and what was done to it."""
    row, what = encode(TOKENIZER, example, max_length, long_rows)
    if row is None:
        return None, [], what
    assert len(row.ids) <= max_length and row.label == example.label
    return TOKENIZER.decode(row.ids), [TOKENIZER.decode(row.ids[a:b]) for a, b in responses(row)], what


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_of_exactly_the_length_stays(policy):
    example = plain(LONG, SHORT)
    assert cut(example, 37, policy) == (f"{LONG}{SHORT}</s>", [f"{SHORT}</s>"], None)
    assert cut(example, 36, policy)[2] is not None


@pytest.mark.parametrize(
    ("example", "max_length", "policies"),
    [
        (plain(LONG, SHORT), 36, ["drop"]),
        (plain(LONG, SHORT), 14, ["truncate_prompt"]),  # the response leaves no room for the prompt
        (plain(LONG, SHORT), 8, ["truncate_prompt"]),
        (plain(LONG, SHORT), 26, ["truncate_response"]),  # the prompt leaves no room for the response
        (TEXT, 10, ["drop", "truncate_prompt"]),
        (TO_CLASSIFY, 11, ["drop", "truncate_response"]),
    ],
)
def test_a_long_row_is_left_out(example, max_length, policies):
    for policy in policies:
        assert cut(example, max_length, policy) == (None, [], TOO_LONG)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(36, "abcdefghijklmopqrstuvwxyz"), (21, "abcdevwxyz"), (20, "abcdewxyz"), (15, "abyz")],
)
def test_a_prompt_is_cut_in_its_middle(max_length, expected):
    shown = cut(plain(LONG, SHORT), max_length, "truncate_prompt")
    assert shown == (f"{expected}{SHORT}</s>", [f"{SHORT}</s>"], CUT_PROMPT)
    assert len(expected) + 11 == max_length


def test_a_long_row_to_classify_is_cut_in_its_middle():
    assert cut(TO_CLASSIFY, 11, "truncate_prompt") == ("abcdevwxyz</s>", [], CUT_PROMPT)


def test_the_template_around_a_cut_prompt_stays(style, tokenizer):
    example = chat([("user", " ".join(["hello world"] * 40)), ("assistant", "the quick brown fox")])
    complete, _ = encode(tokenizer, example)
    room, start = len(complete.ids) - 30, responses(complete)[0][0]
    row, what = encode(tokenizer, example, room, "truncate_prompt")
    head = (start - 30 + 1) // 2
    assert what == CUT_PROMPT and responses(row) == [(start - 30, room)]
    assert row.ids == complete.ids[:head] + complete.ids[head + 30 :]
    if style.bos is not None:
        assert row.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(30, "0123"), (36, SHORT), (27, "0")],  # of 36 only the EOS is too much
)
def test_a_response_that_is_cut_has_no_end(max_length, expected):
    shown = cut(plain(LONG, SHORT), max_length, "truncate_response")
    assert shown == (f"{LONG}{expected}", [expected], CUT_RESPONSE)


def test_a_long_text_is_cut_at_its_end():
    assert cut(TEXT, 10, "truncate_response") == ("abcdefghij", ["bcdefghij"], CUT_RESPONSE)


def test_a_conversation_that_is_cut():
    turns = [("user", LONG), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    text, labels, _ = cut(chat(turns), 29, "truncate_prompt")
    assert labels == ["yes</s>", "no</s>"]
    assert text == "<s>abcdefgvwxyz</s><s>yes</s><s>more</s><s>no</s>"
    text, labels, _ = cut(chat([("user", "a"), *turns[1:]]), 12, "truncate_response")
    assert (text, labels) == ("<s>a</s><s>yes</s><s>mor", ["yes</s>"])
