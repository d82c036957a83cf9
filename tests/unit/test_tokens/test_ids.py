"""Ids where prompt and response touch, of rare characters, and of the padding."""

import copy

import pytest

from speft_ds.data.tokenize import Encoder
from unit.test_tokens.made import (
    PROMPT,
    RESPONSE,
    TURNS,
    chat,
    encode,
    plain,
    text_of,
)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("answer: ", "the fox"),  # " the" is one token
        ("what is th", "e answer"),
        ("question\n", "\nanswer"),
        ("question\n", " the fox"),
        ("12", "34"),
        ("hello \U0001f98a", "\U0001f98a world"),
        ("hello", "\u0301 is an accent"),
    ],
)
def test_the_ids_of_a_prompt_are_those_that_it_has_alone(style, tokenizer, prompt, response):
    row, _ = encode(tokenizer, plain(prompt, response))
    inference = tokenizer(prompt)["input_ids"]
    assert row.ids[: len(inference)] == inference and row.spans == [(len(inference), len(row.ids))]
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{prompt}{response}{style.eos}"


def test_many_rows_at_once_are_as_each_alone(tokenizer):
    examples = [("here", plain(f"{PROMPT} {n} ", f"{n} the {RESPONSE}")) for n in range(20)]
    examples += [("here", chat(TURNS[1:])), ("here", chat(TURNS[1:3]))]
    together = Encoder(tokenizer, 1000, "drop").encode(examples)
    assert together == [encode(tokenizer, example) for _, example in examples]


def test_what_no_tokenizer_has_seen_has_ids_in_the_vocabulary(style, tokenizer):
    row, _ = encode(tokenizer, plain("\u4e16\x00\t\U0001f98a", "\u4e16\x00\t\U0001f98a"))
    assert max(row.ids) < len(tokenizer)
    assert text_of(tokenizer, row.ids[row.spans[0][0] :]) == f"\u4e16\x00\t\U0001f98a{style.eos}"


@pytest.mark.parametrize("classifies", [False, True])
def test_what_is_padded_with_is_in_the_vocabulary_and_no_eos_of_a_class(tokenizer, classifies):
    pad = choose_pad_id(tokenizer, classifies)
    assert 0 <= pad < len(tokenizer)
    assert not classifies or pad != tokenizer.eos_token_id


@pytest.mark.parametrize("classifies", [False, True])
def test_a_padding_that_was_added_behind_the_vocabulary_is_not_used(tokenizers, classifies):
    tokenizer = copy.deepcopy(tokenizers["llama2"])
    num_embeddings = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as many a fine-tuned Llama-2 has it
    assert choose_pad_id(tokenizer, classifies) < num_embeddings


def choose_pad_id(tokenizer, classifies):
    from speft_ds.training.setup import TrainContext

    base = TrainContext.__new__(TrainContext)
    base.tokenizer, base.classifies = tokenizer, classifies
    return base._choose_pad_id()
