"""Prompt templates: plain text with named fields."""

import pytest

from speft_ds.config.data_config import template_fields
from speft_ds.data.formats import CHAT, PLAIN, fill
from speft_ds.errors import UserError


def test_the_fields_of_a_template_are_named_once_and_in_order():
    assert template_fields("Q: {question}\nA: {answer} {question}") == ["question", "answer"]
    assert template_fields("no field, {{braces}} and a {{") == []
    assert template_fields("{class} {ergebnis_\u00e4}") == ["class", "ergebnis_\u00e4"]
    assert template_fields("") == []


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("a { b", "not readable"),
        ("a } b", "not readable"),
        ("{question", "not readable"),
        ("{}", "a field {}"),
        ("{0}", "a field {0}"),
        ("{two words}", "a field {two words}"),
        ("{row.column}", "a field {row.column}"),
        ("{row[0]}", "a field {row[0]}"),
        ("{price:.2f}", "a field {price:.2f}"),
        ("{name!r}", "a field {name!r}"),
        ('{"json": 1}', "a field"),
    ],
)
def test_a_template_that_is_no_text_with_names_is_refused(template, what):
    with pytest.raises(UserError) as caught:
        template_fields(template)
    assert what in caught.value.what and "write {{ for a brace" in caught.value.fix


def test_braces_of_a_value_stay_as_they_are():
    assert fill("{{{code}}} {{x}} {code}", {"code": "{a} {0} {{ }"}) == "{{a} {0} {{ }} {x} {a} {0} {{ }"


def test_the_built_in_templates():
    plain = "### Instruction:\nDO\n\n### Input:\nWITH\n\n### Response:\n"
    with_input, without = (fill(t, {"instruction": "DO", "input": "WITH"}) for t in PLAIN["alpaca"])
    assert with_input.endswith(f"completes the request.\n\n{plain}")
    assert without.endswith("completes the request.\n\n### Instruction:\nDO\n\n### Response:\n")
    assert [template_fields(t) for t in CHAT["alpaca"]] == [["instruction", "input"], ["instruction"]]
