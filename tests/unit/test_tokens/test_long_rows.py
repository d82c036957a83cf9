"""Rows that are too long, cut or left out; most have one token a byte."""

import pytest
import tiny

from speft_ds.data.formats import Example
from speft_ds.data.tokenize import LONG_ROWS
from unit.test_tokens.made import (
    RESPONSE,
    chat,
    check_bos,
    encode,
    plain,
)

LONG, SHORT = "abcdefghijklmnopqrstuvwxyz", "0123456789"


@pytest.fixture(scope="module")
def one_a_byte():
    return tiny.make_tokenizer()


def cut(tokenizer, example, max_length, long_rows):
    row, what = encode(tokenizer, example, max_length, long_rows)
    if row is None:
        return None, None, what
    assert len(row.ids) <= max_length
    return tokenizer.decode(row.ids), [tokenizer.decode(row.ids[a:b]) for a, b in row.spans], what


def test_a_row_of_exactly_the_length_stays(one_a_byte):
    whole = (f"{LONG}{SHORT}</s>", [f"{SHORT}</s>"], None)
    for policy in ("drop", "truncate_prompt", "truncate_response"):
        assert cut(one_a_byte, plain(LONG, SHORT), 37, policy) == whole
        assert cut(one_a_byte, plain(LONG, SHORT), 36, policy)[2] in LONG_ROWS


def test_a_long_row_is_left_out(one_a_byte):
    assert encode(one_a_byte, plain(LONG, SHORT), 36, "drop") == (None, "too long, left out")


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(36, "abcdefghijklmopqrstuvwxyz"), (21, "abcdevwxyz"), (20, "abcdewxyz"), (15, "abyz")],
)
def test_a_prompt_is_cut_in_its_middle(one_a_byte, max_length, expected):
    shown = cut(one_a_byte, plain(LONG, SHORT), max_length, "truncate_prompt")
    assert shown == (f"{expected}{SHORT}</s>", [f"{SHORT}</s>"], "truncated prompt")
    assert len(expected) + 11 == max_length


@pytest.mark.parametrize("max_length", [14, 11, 8])
def test_a_response_that_leaves_no_room_for_its_prompt_is_left_out(one_a_byte, max_length):
    shown = encode(one_a_byte, plain(LONG, SHORT), max_length, "truncate_prompt")
    assert shown == (None, "too long, left out")


def test_the_template_around_a_cut_prompt_stays(style, tokenizer):
    whole, _ = encode(tokenizer, chat([("user", " ".join(["hello world"] * 40)), ("assistant", RESPONSE)]))
    room = len(whole.ids) - 30
    row, what = encode(
        tokenizer,
        chat([("user", " ".join(["hello world"] * 40)), ("assistant", RESPONSE)]),
        room,
        "truncate_prompt",
    )
    assert what == "truncated prompt" and len(row.ids) == room
    before = whole.ids[: whole.spans[0][0]]
    kept = row.spans[0][0]
    head = (kept + 1) // 2
    assert row.ids[:kept] == [*before[:head], *before[-(kept - head) :]]
    assert row.ids[kept:] == whole.ids[len(before) :] and row.spans == [(kept, room)]
    check_bos(style, tokenizer, row)


def test_a_cut_prompt_moves_every_later_span(one_a_byte):
    turns = [("user", LONG), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    text, learnt, _ = cut(one_a_byte, chat(turns), 29, "truncate_prompt")
    assert learnt == ["yes</s>", "no</s>"]
    assert text == "<s>abcdefgvwxyz</s><s>yes</s><s>more</s><s>no</s>"


def test_a_response_that_is_cut_learns_no_end(one_a_byte):
    shown = cut(one_a_byte, plain(LONG, SHORT), 30, "truncate_response")
    assert shown == (f"{LONG}0123", ["0123"], "truncated response")
    shown = cut(one_a_byte, plain(LONG, SHORT), 36, "truncate_response")  # only the EOS is too much
    assert shown == (f"{LONG}{SHORT}", [SHORT], "truncated response")
    shown = cut(one_a_byte, plain(LONG, SHORT), 27, "truncate_response")
    assert shown == (f"{LONG}0", ["0"], "truncated response")


def test_a_prompt_that_leaves_no_room_for_its_response_is_left_out(one_a_byte):
    shown = encode(one_a_byte, plain(LONG, SHORT), 26, "truncate_response")
    assert shown == (None, "too long, left out")


def test_turns_beyond_the_cut_are_not_learnt(one_a_byte):
    turns = [("user", "a"), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    text, learnt, _ = cut(one_a_byte, chat(turns), 12, "truncate_response")
    assert (text, learnt) == ("<s>a</s><s>yes</s><s>mor", ["yes</s>"])


def test_a_long_text_is_cut_at_its_end_or_left_out(one_a_byte):
    text = Example([{"role": "assistant", "content": LONG}], False)
    assert cut(one_a_byte, text, 10, "truncate_response") == (
        "abcdefghij",
        ["bcdefghij"],
        "truncated response",
    )
    for policy in ("drop", "truncate_prompt"):
        assert encode(one_a_byte, text, 10, policy) == (None, "too long, left out")


def test_a_long_row_to_classify_is_cut_in_its_middle(one_a_byte):
    example = Example([{"role": "user", "content": LONG}], False, label=1)
    row, what = encode(one_a_byte, example, 11, "truncate_prompt")
    assert (one_a_byte.decode(row.ids), row.label, row.spans) == ("abcdevwxyz</s>", 1, [])
    assert what == "truncated prompt"
    for policy in ("drop", "truncate_response"):
        assert encode(one_a_byte, example, 11, policy) == (None, "too long, left out")
