"""Rows with a class: for a classifier, and for a language model."""

import pytest

from unit.test_tokens.made import PROMPT, check, check_bos, row_of


@pytest.mark.parametrize("chat_template", [True, False])
def test_the_rows_of_a_classification_end_with_the_eos_and_learn_no_token(style, tokenizer, chat_template):
    data = {"format": "classification", "chat_template": chat_template}
    row = row_of(tokenizer, {"text": PROMPT, "label": "yes"}, classify=True, **data)
    assert (row.label, row.spans, row.num_labels) == (1, [], 1)
    assert row.ids[-1] == tokenizer.eos_token_id and row.ids[-2] != tokenizer.eos_token_id
    check_bos(style, tokenizer, row)
    if not chat_template:
        assert row.ids == [*tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id]


def test_a_language_model_learns_a_class_by_its_name(style, tokenizer):
    row = row_of(tokenizer, {"text": PROMPT, "label": 1}, format="classification")
    check(tokenizer, row, style.pieces([("user", PROMPT), ("assistant", "yes")]))
    assert row.label is None
