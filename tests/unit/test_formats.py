"""From a row of a data set to a conversation: by its format, and what is wrong with a row."""

import pytest

from speft_ds.config.data_config import Columns, DataConfig
from speft_ds.data.formats import Classes, EmptyRow, check_columns, columns_of, find_classes, make_example
from speft_ds.errors import UserError

NAN = float("nan")


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
    assert caught.value.where == "rows.jsonl:7" and type(caught.value) is kind
    return caught.value


# Prompt and response


def test_prompt_and_response():
    row = {"prompt": " a ", "response": "b\n", "other": 1}
    assert turns(row) == [("user", " a "), ("assistant", "b\n")]
    assert example(row).is_chat and not example(row, chat_template=False).is_chat
    named = {"question": "a", "answer": "b"}
    assert turns(named, columns={"prompt": "question", "response": "answer"})[0] == ("user", "a")


def test_a_template_names_columns():
    row = {"question": "a {b}", "context": "{question}", "response": "d", "n": 3}
    prompt = turns(row, template="{{x}} {question} / {context} ({n})")[0]
    assert prompt == ("user", "{x} a {b} / {question} (3)")
    assert turns({"q": "a", "response": "b"}, template="{prompt}", columns={"prompt": "q"})[0] == (
        "user",
        "a",
    )
    assert turns({"schema": "s", "json": "j", "copy": "c", "response": "b"}, template="{schema}{json}{copy}")[
        0
    ] == ("user", "sjc")


def test_numbers_are_text():
    assert turns({"prompt": 2, "response": 0.5}) == [("user", "2"), ("assistant", "0.5")]
    assert turns({"prompt": 0, "response": 0}) == [("user", "0"), ("assistant", "0")]


def test_a_template_without_a_field_is_every_rows_prompt():
    assert turns({"response": "b"}, template="Tell me a story.")[0] == ("user", "Tell me a story.")


@pytest.mark.parametrize("empty", [None, "", " \n\t", NAN])
def test_an_empty_prompt_or_response_is_an_empty_row(empty):
    assert "empty" in refused({"prompt": "a", "response": empty}, EmptyRow).what
    error = refused({"prompt": empty, "response": "b"}, EmptyRow)
    assert error.what == "the prompt is empty: prompt" and "data.empty_rows=drop" in error.fix
    assert (
        "question, context"
        in refused(
            {"question": empty, "context": empty, "response": "b"}, EmptyRow, template="{question} {context}"
        ).what
    )


@pytest.mark.parametrize("empty", [None, "", NAN])
def test_of_several_fields_some_may_be_empty(empty):
    row = {"question": "a", "context": empty, "response": "b"}
    assert turns(row, template="{question} [{context}]")[0] == ("user", "a []")


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True])
def test_what_is_no_text_is_refused(value):
    kind = type(value).__name__
    assert refused({"prompt": "a", "response": value}).what == f"'response' holds a {kind}, not text"
    assert refused({"prompt": value, "response": "a"}).what == f"'prompt' holds a {kind}, not text"


def test_half_a_character_is_refused():
    assert "half a character at position 2" in refused({"prompt": "ab\ud83d", "response": "c"}).what
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\udc00"}]
    assert "half a character" in refused({"messages": messages}, format="messages").what


# Columns


def test_a_missing_column_is_named_with_the_closest():
    (error,) = check_columns({"promt": "a", "response": "b"}, "here", source())
    assert "no column 'prompt', named by data.columns.prompt" in error.what
    assert error.fix == "did you mean data.columns.prompt=promt?"
    errors = check_columns({"x": "a", "y": "b"}, "here", source())
    assert [e.fix for e in errors] == [
        "type data.columns.prompt=COLUMN, one of: x, y",
        "type data.columns.response=COLUMN, one of: x, y",
    ]
    assert refused({"x": 1}).what == errors[0].what


def test_a_missing_field_of_a_template_is_named():
    (error,) = check_columns({"ask": "a", "response": "b"}, "here", source(template="{question}"))
    assert "'question', a field of data.template" in error.what and "ask, response" in error.fix


@pytest.mark.parametrize("row", [1, "a", ["a"], None])
def test_a_row_that_is_no_object_is_refused(row):
    assert refused(row).what == "a row is not a JSON object"


@pytest.mark.parametrize("format", ["prompt_completion", "alpaca", "messages", "text", "classification"])
def test_every_format_needs_its_columns(format):
    needed = {
        "prompt_completion": ["prompt", "response"],
        "alpaca": ["instruction", "input", "output"],
        "messages": ["messages"],
        "text": ["text"],
        "classification": ["text", "label"],
    }[format]
    assert columns_of(source(format=format)) == {name: f"data.columns.{name}" for name in needed}
    assert len(check_columns({}, "here", source(format=format))) == len(needed)


# Alpaca


def alpaca(row, **data):
    return turns(row, format="alpaca", **data)


@pytest.mark.parametrize("empty", ["", None, "  ", NAN])
def test_alpaca_rows_with_and_without_an_input(empty):
    full = {"instruction": "do", "input": "this", "output": "b"}
    assert alpaca(full) == [("user", "do\n\nthis"), ("assistant", "b")]
    assert alpaca({**full, "input": empty})[0] == ("user", "do")
    plain = [alpaca({**full, "input": text}, chat_template=False)[0][1] for text in ("this", empty)]
    assert plain[0].endswith("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n")
    assert plain[1].endswith("### Instruction:\ndo\n\n### Response:\n") and "Input" not in plain[1]
    own = {"template": "{instruction}: {input}", "template_no_input": "{instruction}!"}
    assert [alpaca({**full, "input": text}, **own)[0][1] for text in ("this", empty)] == ["do: this", "do!"]


def test_alpaca_data_without_an_input_column():
    row, columns = {"instruction": "do", "output": "b"}, {"input": None}
    assert alpaca(row, columns=columns)[0] == ("user", "do")
    assert "data.columns.input=null where no row has an input" in refused(row, format="alpaca").fix
    own = {"template": "{instruction}: {input}", "columns": columns}
    assert alpaca(row, **own, template_no_input="{instruction}!")[0] == ("user", "do!")
    assert "no column 'input'" in refused(row, format="alpaca", **own).what


def test_the_input_column_decides_whichever_fields_a_template_has():
    own = {"template": "{instruction} {context}", "template_no_input": "{instruction}!"}
    row = {"instruction": "do", "context": "c", "output": "b"}
    assert alpaca({**row, "input": "x"}, **own)[0][1] == "do c"
    assert alpaca({**row, "input": ""}, **own)[0][1] == "do!"
    assert "no column 'input'" in refused(row, format="alpaca", **own).what


def test_an_empty_instruction_with_an_input_is_kept():
    assert alpaca({"instruction": "", "input": "this", "output": "b"})[0] == ("user", "\n\nthis")
    refused({"instruction": "", "input": " ", "output": "b"}, EmptyRow, format="alpaca")


# Messages and text


def says(role, content):
    return {"role": role, "content": content}


def test_a_conversation_ends_with_what_the_assistant_says_last():
    talk = [says("system", "s"), says("user", "a"), says("assistant", "b"), says("user", "c")]
    expected = [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert turns({"messages": talk}, format="messages") == expected
    assert turns({"chat": tuple(talk)}, format="messages", columns={"messages": "chat"}) == expected
    assert turns({"messages": [{**turn, "name": "x"} for turn in talk]}, format="messages") == expected


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        None,
        [1],
        ["user: a"],
        {"role": "user", "content": "a"},
        [{"from": "human", "value": "a"}],
        [says("user", "a"), says("assistant", None)],
        [says("user", ["a"]), says("assistant", "b")],
        [says(1, "a")],
    ],
)
def test_bad_messages_are_refused(messages):
    error = refused({"messages": messages}, format="messages")
    assert '[{"role": "user", "content": "..."}' in error.fix


@pytest.mark.parametrize("messages", [[], [says("user", "a")], [says("user", "a"), says("assistant", " ")]])
def test_a_conversation_in_which_nobody_answers_is_an_empty_row(messages):
    assert (
        "nothing that an assistant says" in refused({"messages": messages}, EmptyRow, format="messages").what
    )


def test_plain_text():
    assert turns({"text": "a"}, format="text") == [("assistant", "a")]
    assert not example({"text": "a"}, format="text").is_chat
    refused({"text": "\n"}, EmptyRow, format="text")


# Classification


@pytest.mark.parametrize(("label", "number"), [("no", 0), ("yes", 1), (0, 0), (1, 1), ("1", 1), ("0", 0)])
def test_a_label_is_a_name_or_a_number(label, number):
    classes = Classes.named(["no", "yes"])
    row = {"text": "a", "label": label}
    shown = example(row, classes, True, format="classification")
    assert shown.label == number and shown.turns == [says("user", "a")]
    shown = example(row, classes, False, format="classification", template="{text}?")
    assert shown.label is None
    assert shown.turns == [says("user", "a?"), says("assistant", ["no", "yes"][number])]


@pytest.mark.parametrize("label", ["maybe", 2, -1, "2", True, 1.0, ["yes"], "Yes"])
def test_a_label_that_is_none_of_the_classes_is_refused(label):
    options = {"classes": Classes.named(["no", "yes"]), "format": "classification"}
    error = refused({"text": "a", "label": label}, **options)
    assert error.what == f"the label {label!r} is not one of data.labels" and "no, yes" in error.fix


@pytest.mark.parametrize("label", [None, "", NAN])
def test_a_row_without_a_label_is_an_empty_row(label):
    options = {"classes": Classes.named(["no", "yes"]), "format": "classification"}
    assert refused({"text": "a", "label": label}, EmptyRow, **options).what == "the row has no label"


def test_where_classes_are_named_by_numbers_a_number_is_a_name():
    stars = Classes.named(["1", "2", "3"])
    labels = [1, "1", 3, "3"]
    numbers = [
        example({"text": "a", "label": label}, stars, True, format="classification").label for label in labels
    ]
    assert numbers == [0, 0, 2, 2]
    assert "not one of" in refused({"text": "a", "label": 0}, classes=stars, format="classification").what


def rows(*labels):
    return [(f"rows:{n}", {"label": label}) for n, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([3, 1, 2, 1], ["1", "2", "3"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["b", None, "", NAN, "a"], ["a", "b"]),
    ],
)
def test_classes_are_found_in_the_rows(labels, names):
    classes = find_classes(iter(rows(*labels)), "label")
    assert classes.names == names
    for label in labels:
        if label and label == label:
            assert names[classes.numbers[label]] == str(label)


@pytest.mark.parametrize(
    ("labels", "what", "where"),
    [
        (["a", 1], "numbers in some rows, texts in others", "label"),
        (["a", "a"], "1 different label(s)", "label"),
        ([None], "0 different label(s)", "label"),
        ([1, 0.5], "no label in 'label'", "rows:2"),
        ([True, False], "no label in 'label'", "rows:1"),
        (["a", ["b"]], "no label in 'label'", "rows:2"),
    ],
)
def test_what_makes_no_classes_is_refused(labels, what, where):
    with pytest.raises(UserError) as caught:
        find_classes(rows(*labels), "label")
    assert what in caught.value.what and caught.value.where == where


@pytest.mark.parametrize("row", [{"x": 1}, [1], "a"])
def test_a_row_without_the_column_of_labels_is_refused(row):
    with pytest.raises(UserError, match=r"(?s)no label in 'label'.*no such column"):
        find_classes([("here", row)], "label")
