"""Rows as plain text, against what the tokenizer gives at inference."""

import pytest

from unit.test_tokens.made import PROMPT, RESPONSE, check, check_bos, encode, plain, row_of, text_of

ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"prompt": f"{PROMPT}\n", "response": RESPONSE}, {"format": "prompt_completion"}),
        ({"prompt": PROMPT, "response": RESPONSE}, {"template": "question: {prompt}\nanswer:\n"}),
        ({"instruction": PROMPT, "input": "", "output": RESPONSE}, {"format": "alpaca"}),
        ({"instruction": PROMPT, "input": "red", "output": RESPONSE}, {"format": "alpaca"}),
    ],
    ids=["prompt_completion", "template", "alpaca", "alpaca_input"],
)
def test_a_prompt_and_its_response_as_plain_text(style, tokenizer, row, data):
    encoded = row_of(tokenizer, row, chat_template=False, **data)
    if data.get("format") == "alpaca":
        task = "Below is an instruction that describes a task. "
        given = ""
        if row["input"]:
            task = (
                "Below is an instruction that describes a task, paired with an input that provides further "
                "context. "
            )
            given = "### Input:\nred\n\n"
        prompt = f"{task}{ALPACA}{PROMPT}\n\n{given}### Response:\n"
    else:
        prompt = f"question: {PROMPT}\nanswer:\n" if "template" in data else row["prompt"]
    pieces = [((style.bos or "") + prompt, False), (f"{RESPONSE}{style.eos}", True)]
    check(tokenizer, encoded, pieces)
    check_bos(style, tokenizer, encoded)
    inference = tokenizer(prompt)["input_ids"]  # here the tokenizer itself writes the BOS
    assert encoded.ids[: len(inference)] == inference


def test_of_a_text_all_is_learnt_but_its_first_token(style, tokenizer):
    row = row_of(tokenizer, {"text": RESPONSE}, format="text")
    assert row.ids == [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]
    assert row.spans == [(1, len(row.ids))]
    check_bos(style, tokenizer, row)


def test_of_an_empty_beginning_nothing_is_learnt_twice(tokenizers):
    row, _ = encode(tokenizers["qwen2"], plain("", "yes"))
    assert row.ids == [*tokenizers["qwen2"]("yes")["input_ids"], tokenizers["qwen2"].eos_token_id]
    assert row.spans == [(1, len(row.ids))]


def test_a_bos_and_an_eos_that_stand_in_the_text_are_not_doubled(style, tokenizer):
    row, _ = encode(tokenizer, plain(f"{style.bos or ''}{PROMPT}\n", f"{RESPONSE}{style.eos}\n"))
    check_bos(style, tokenizer, row)
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{PROMPT}\n{RESPONSE}{style.eos}"


def test_what_stands_behind_an_eos_in_the_text_is_kept(style, tokenizer):
    row, _ = encode(tokenizer, plain(f"{PROMPT}\n", f"yes{style.eos} no"))
    assert tokenizer.decode(row.ids).endswith(f"yes{style.eos} no{style.eos}")
