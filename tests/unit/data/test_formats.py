"""From a row of a data set to a conversation: by its format, and what is wrong with a row."""

import math
import re

import pytest
import yaml

from speft_ds.config.data_config import COLUMNS, Columns, DataConfig, template_fields
from speft_ds.data.formats import Classes, EmptyRow, check_columns, columns_of, find_classes, make_example
from speft_ds.data.readers import NamedClass
from speft_ds.errors import UserError
from unit.data.made import refusal

NAN = float("nan")
EMPTY = [None, "", " \n\t", NAN]
NO_YES = Classes.named(["no", "yes"])


def source(**data):
    if "columns" in data:
        data["columns"] = Columns(**data["columns"])
    return DataConfig(path="x.jsonl", **data).sources[0]


def example(row, classes=None, classify=False, **data):
    return make_example(row, "rows.jsonl:7", source(**data), classes, classify)


def turns(*args, **options):
    return [(turn["role"], turn["content"]) for turn in example(*args, **options).turns]


def refused(row, kind=UserError, **options):
    with pytest.raises(kind) as caught:
        example(row, **options)
    assert caught.value.where == "rows.jsonl:7" and type(caught.value) is kind and caught.value.fix
    return caught.value


# Prompt, response and template


def test_prompt_and_response():
    row = {"prompt": " a ", "response": "b\n", "other": 1}
    assert turns(row) == [("user", " a "), ("assistant", "b\n")]
    assert example(row).is_chat and not example(row, chat_template=False).is_chat
    named = {"question": "a", "answer": "b"}
    assert turns(named, columns={"prompt": "question", "response": "answer"})[0] == ("user", "a")
    assert turns({"prompt": 0, "response": 0.5}) == [("user", "0"), ("assistant", "0.5")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{x}} {question} / {context} ({n})", "{x} a {b} / {question} (3)"),  # braces of a value stay
        ("{schema}{json}{copy}", "sjc"),  # names of pydantic's own
        ("{prompt}", "q"),  # renamed below
        ("{none} [{question}]", " [a {b}]"),  # of several fields some may be empty
        ("Tell me a story.", "Tell me a story."),
    ],
)
def test_a_template_names_columns(template, expected):
    row = {"question": "a {b}", "context": "{question}", "response": "d", "n": 3, "none": NAN}
    row |= {"schema": "s", "json": "j", "copy": "c", "q": "q"}
    assert turns(row, template=template, columns={"prompt": "q"})[0] == ("user", expected)


def test_the_fields_of_a_template_are_named_once_and_in_order():
    assert template_fields("Q: {question}\nA: {answer} {question}") == ["question", "answer"]
    assert template_fields("no field, {{braces}} and a {{") == template_fields("") == []
    assert template_fields("{class} {ergebnis_\u00e4}") == ["class", "ergebnis_\u00e4"]


BRACES = ["a { b", "a } b", "{question"]
FIELDS = ["{}", "{0}", "{two words}", "{row.column}", "{row[0]}", "{price:.2f}", "{name!r}", '{"json": 1}']


@pytest.mark.parametrize("template", BRACES + FIELDS)
def test_a_template_that_is_no_text_with_names_is_refused(template):
    with refusal(None, "{{"):
        template_fields(template)


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_prompt_or_response_is_an_empty_row(empty):
    template = "{question} {context}"
    for row, data in (
        ({"prompt": "a", "response": empty}, {}),
        ({"prompt": empty, "response": "b"}, {}),
        ({"question": empty, "context": empty, "response": "b"}, {"template": template}),
        ({"text": empty}, {"format": "text"}),
        ({"text": "a", "label": empty}, {"format": "classification", "classes": NO_YES}),
        ({"messages": [says("user", "a")]}, {"format": "messages"}),
        ({"messages": []}, {"format": "messages"}),
        ({"messages": empty}, {"format": "messages"}),
        ({"messages": [says("user", "a"), says("assistant", " ")]}, {"format": "messages"}),
    ):
        assert "data.empty_rows=drop" in refused(row, EmptyRow, **data).fix


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True, "ab\ud83d"])
def test_what_is_no_text_or_no_row_is_refused(value):
    refused({"prompt": "a", "response": value})
    refused({"prompt": value, "response": "a"})
    refused(value if value != {"a": 1} else None)


# Columns


def test_a_missing_column_is_named_with_the_closest():
    (error,) = check_columns({"promt": "a", "response": "b"}, "here", source())
    assert "data.columns.prompt=promt" in error.fix and error.where == "here"
    errors = check_columns({"x": "a", "y": "b"}, "here", source())
    keys = ["data.columns.prompt", "data.columns.response"]
    for key, error in zip(keys, errors, strict=True):
        assert key in error.what and key in error.fix and "x, y" in error.fix
    assert all(error.what in refused({"x": 1}).what for error in errors)
    (error,) = check_columns({"ask": "a", "response": "b"}, "here", source(template="{question}"))
    assert "data.template" in error.what and "ask, response" in error.fix


@pytest.mark.parametrize(("format", "needed"), COLUMNS.items())
def test_every_format_needs_its_columns(format, needed):
    columns = columns_of(source(format=format))
    assert columns == {name: f"data.columns.{name}" for name in needed}


@pytest.mark.parametrize(("file", "is_table"), [("a.csv", True), ("a.tsv.gz", True), ("a.jsonl", False)])
def test_a_table_without_a_header(file, is_table):
    problems = check_columns({"what is it?": "who?", "a dog": "me"}, f"{file}:2", source())
    assert ["prompt,response" in problem.fix for problem in problems] == [is_table] * 2
    (problem,) = check_columns({"prompt": "who?", "a dog": "me"}, f"{file}:2", source())
    assert "header" not in problem.fix


# Alpaca


def alpaca(row, **data):
    return turns({"output": "b", **row}, format="alpaca", **data)[0][1]


@pytest.mark.parametrize("empty", EMPTY)
def test_alpaca_rows_with_and_without_an_input(empty):
    rows = [{"instruction": "do", "input": text} for text in ("this", empty)]
    assert [alpaca(row) for row in rows] == ["do\n\nthis", "do"]
    with_input, without = (alpaca(row, chat_template=False) for row in rows)
    paired, respond = "paired with an input that provides further context.", "### Response:\n"
    write = "Write a response that appropriately completes the request.\n\n### Instruction:\ndo\n\n"
    task = "Below is an instruction that describes a task"
    assert with_input == f"{task}, {paired} {write}### Input:\nthis\n\n{respond}"
    assert without == f"{task}. {write}{respond}"
    # The input column decides, whichever fields a template has.
    own = {"template": "{instruction} as {output}", "template_no_input": "{instruction}!"}
    assert [alpaca(row, **own) for row in rows] == ["do as b", "do!"]
    assert alpaca({"instruction": "", "input": "this"}) == "\n\nthis"
    refused({"instruction": "", "input": empty, "output": "b"}, EmptyRow, format="alpaca")


def test_alpaca_data_without_an_input_column():
    row, columns = {"instruction": "do"}, {"input": None}
    own = {"template": "{instruction}: {input}", "columns": columns}
    assert alpaca(row, columns=columns) == "do"
    assert alpaca(row, **own, template_no_input="{instruction}!") == "do!"
    for data in ({}, own):
        error = refused({"output": "b", **row}, format="alpaca", **data)
        assert "'input'" in error.what and "data.columns.input=null" in error.fix


# Messages and text


def says(role, content):
    return {"role": role, "content": content}


def test_a_conversation_ends_with_what_the_assistant_says_last_and_text_is_the_assistants():
    talk = [says("system", "s"), says("user", "a"), says("assistant", "b"), says("user", "c")]
    expected = [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert turns({"messages": talk}, format="messages") == expected
    assert turns({"chat": tuple(talk)}, format="messages", columns={"messages": "chat"}) == expected
    named = [{**turn, "name": "x"} for turn in talk]
    assert example({"messages": named}, format="messages").turns == named[:3]
    assert turns({"text": "a"}, format="text") == [("assistant", "a")]
    assert not example({"text": "a"}, format="text").is_chat


BAD_TURNS = [[1], ["user: a"], [{"speaker": "human", "value": "a"}], [says(1, "a")]]


BAD_CONTENTS = [None, [1], "\udc00"]  # the last is half a character


@pytest.mark.parametrize(
    "messages",
    ["text", says("user", "a"), *BAD_TURNS, *([says("assistant", bad)] for bad in BAD_CONTENTS)],
)
def test_bad_messages_are_refused(messages):
    refused({"messages": messages}, format="messages")


# Classification


NAMED = [
    ("no", 0),
    ("yes", 1),
    (" yes ", 1),
    (NamedClass(0, ["yes", "no"]), 1),
    (NamedClass(1, ["bad", "good"]), 1),
]
NUMBERED = [(0, 0), (1, 1), ("1", 1), ("0", 0), (1.0, 1), ("1.0", 1)]


@pytest.mark.parametrize(("label", "number"), NAMED + NUMBERED)
def test_a_label_is_a_name_or_a_number(label, number):
    row = {"text": "a", "label": label}
    shown = example(row, NO_YES, True, format="classification")
    assert shown.label == number and shown.turns == [says("user", "a")]
    shown = example(row, NO_YES, False, format="classification", template="{text}?")
    assert shown.label is None
    assert shown.turns == [says("user", "a?"), says("assistant", ["no", "yes"][number])]


@pytest.mark.parametrize(
    "label", ["maybe", 2, -1, "2", True, 0.5, ["yes"], "Yes", NamedClass(1, ["no", "x"])]
)
def test_a_label_that_is_none_of_the_classes_is_refused(label):
    error = refused({"text": "a", "label": label}, classes=NO_YES, format="classification")
    (typed,) = re.findall(r"data\.labels=(\[.*\])", error.fix)
    assert yaml.safe_load(typed) == ["no", "yes"]  # and not [False, True]


def test_where_classes_are_named_by_numbers_a_number_is_a_name():
    stars, data = Classes.named(["1", "2", "3"]), {"format": "classification"}
    for label, number in ((1, 0), ("1", 0), ("3", 2)):
        assert example({"text": "a", "label": label}, stars, True, **data).label == number
    refused({"text": "a", "label": 0}, classes=stars, **data)


def test_booleans_have_the_classes_of_their_names():
    for names in (["true", "false"], ["True", "False"]):
        assert [Classes.named(names).number_of(label) for label in (True, False, "TRUE")] == [0, 1, 0]


@pytest.mark.parametrize("names", [["a", "a "], ["1", "1.0"], ["a", " "]])
def test_names_that_are_the_same_once_trimmed_are_refused(names):
    with refusal("data.labels", "trimmed"):
        Classes.named(names)


def rows(*labels):
    return [(f"rows:{n}", {"label": label}, "label") for n, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["b", None, "a", "", "b", NAN], {"a": 0, "b": 1}),
        ([10, 9, -1, 9], {"-1": 0, "9": 1, "10": 2}),
        (["10", "9", "1"], {"1": 0, "9": 1, "10": 2}),
        (["-2", "-10", "+3"], {"-10": 0, "-2": 1, "3": 2}),
        ([1.0, 0.0, 1, "1"], {"0": 0, "1": 1}),
        ([4.5, 10.0, 0.5], {"0.5": 0, "4.5": 1, "10": 2}),
        ([True, False, "True"], {"false": 0, "true": 1}),
        (["bad ", " bad", "good"], {"bad": 0, "good": 1}),
        ([NamedClass(1, ["omega", "alpha"]), NamedClass(0, ["omega", "alpha"])], {"omega": 0, "alpha": 1}),
        (["018", "18", 0.5], {"0.5": 0, "018": 1, "18": 2}),
        (["b", "1"], {"1": 0, "b": 1}),
        (["1" * 25, "1" * 24 + "2"], {"1" * 25: 0, "1" * 24 + "2": 1}),
    ],
)
def test_classes_are_found_in_the_rows(labels, found):
    classes = find_classes(iter(rows(*labels)))
    assert classes.numbers == found and classes.names == list(found)
    given = [label for label in labels if label not in (None, "", NAN)]
    # Named as they were found, they are numbered alike: rows to validate on are read so.
    assert [Classes.named(classes.names).number_of(label) for label in given] == [
        classes.number_of(label) for label in given
    ]


@pytest.mark.parametrize("labels", [("a", 1), (1, True), ("true", 0), ("a", "a "), (1, 1.0), (None,)])
def test_labels_that_make_no_two_classes_are_refused(labels):
    with refusal("data.columns.label", "data."):
        find_classes(rows(*labels))


@pytest.mark.parametrize("row", [{"label": math.inf}, {"label": ["b"]}, {"x": 1}, [1]])
def test_a_row_without_a_label_is_refused(row):
    with refusal("rows:3", "data.columns.label"):
        find_classes([*rows("a", "b"), ("rows:3", row, "label")])
