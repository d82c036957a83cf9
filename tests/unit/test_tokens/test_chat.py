"""Rows in a chat template, against what transformers gives at inference."""

import copy

import pytest
import tiny

from speft_ds.data.tokenize import Encoder
from speft_ds.errors import UserError
from unit.test_tokens.made import (
    PROMPT,
    RESPONSE,
    TURNS,
    chat,
    check,
    check_bos,
    encode,
    row_of,
)
from unit.tokenizers_small import STYLES


def at_inference(tokenizer, turns):
    """Ids of the prompt before an answer, as a user of transformers gets them."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(
    ("row", "data", "prompt"),
    [
        ({"prompt": PROMPT, "response": RESPONSE}, {"format": "prompt_completion"}, PROMPT),
        ({"instruction": PROMPT, "input": "", "output": RESPONSE}, {"format": "alpaca"}, PROMPT),
        (
            {"instruction": PROMPT, "input": "red\ngreen", "output": RESPONSE},
            {"format": "alpaca"},
            f"{PROMPT}\n\nred\ngreen",
        ),
        (
            {"messages": [dict(role=r, content=c) for r, c in (("user", PROMPT), ("assistant", RESPONSE))]},
            {"format": "messages"},
            PROMPT,
        ),
    ],
    ids=["prompt_completion", "alpaca", "alpaca_input", "messages"],
)
def test_a_prompt_and_its_response_in_the_chat_template(style, tokenizer, row, data, prompt):
    encoded = row_of(tokenizer, row, **data)
    check(tokenizer, encoded, style.pieces([("user", prompt), ("assistant", RESPONSE)]))
    check_bos(style, tokenizer, encoded)
    inference = at_inference(tokenizer, [("user", prompt)])
    assert encoded.ids[: len(inference)] == inference and encoded.spans == [
        (len(inference), len(encoded.ids))
    ]


def test_every_turn_of_the_assistant_is_learnt_and_no_other(style, tokenizer):
    turns = TURNS if style.has_system else TURNS[1:]
    row, _ = encode(tokenizer, chat(turns))
    check(tokenizer, row, style.pieces(turns))
    check_bos(style, tokenizer, row, count=2 if style.name == "llama2" else 1)  # which has one a question
    first, second = (at_inference(tokenizer, turns[:n]) for n in (len(turns) - 3, len(turns) - 1))
    assert row.ids[: row.spans[0][0]] == first
    assert row.ids[: row.spans[1][0]] == second


def test_what_a_user_says_after_the_last_answer_is_left_out(style, tokenizer):
    turns = [{"role": role, "content": text} for role, text in TURNS[1:]]
    row = row_of(tokenizer, {"messages": [*turns, {"role": "user", "content": "hello?"}]}, format="messages")
    check(tokenizer, row, style.pieces(TURNS[1:]))


def test_a_system_prompt_that_the_template_refuses_is_named(tokenizers):
    with pytest.raises(UserError, match=r"(?s)refuses the row: System role not supported.*here"):
        encode(tokenizers["gemma"], chat(TURNS))


def test_a_template_that_writes_the_past_otherwise_is_refused(tokenizers, monkeypatch):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}!{% endif %}"
    )
    monkeypatch.setattr(tokenizers["qwen2"], "chat_template", template)
    with pytest.raises(UserError, match="the response cannot be told from the prompt"):
        encode(tokenizers["qwen2"], chat(TURNS))


def test_a_template_without_a_bos_gets_the_one_that_the_tokenizer_writes(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["llama3"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    row, _ = encode(tokenizer, chat(TURNS))
    check(tokenizer, row, STYLES["llama3"].pieces(TURNS))
    asked = [{"role": role, "content": text} for role, text in TURNS[:2]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert row.ids[: row.spans[0][0]] == tokenizer(prompt)["input_ids"]


def test_a_missing_chat_template_or_eos_is_refused():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"(?s)no chat template.*data.chat_template=false"):
        encode(tokenizer, chat(TURNS))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(tokenizer, 10, "drop")
