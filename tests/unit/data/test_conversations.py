"""The forms of conversations in data sets, and what is wrong with one."""

import json

import pytest

from speft_ds.config.data_config import Columns, DataConfig
from speft_ds.data.conversations import EmptyRow
from speft_ds.data.formats import check_columns, make_example
from speft_ds.errors import UserError

HERE = "rows.jsonl:7"
CALL = {"type": "function", "id": "a1", "function": {"name": "sum", "arguments": {"a": 2}}}


DEEP = "[" * 100_000


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(call):
    return [says("assistant", None, tool_calls=[call])]


TALK = [says("user", "hello"), says("assistant", "world")]
CALLS = [
    says("user", "2+2?"),
    says("assistant", "", tool_calls=[CALL]),
    says("tool", "4", tool_call_id="a1"),
    says("assistant", "it is 4"),
]


def source(**data):
    if "columns" in data:
        data["columns"] = Columns(**data["columns"])
    return DataConfig(path="rows.jsonl", **data).sources[0]


def example(row, **data):
    data = data or {"format": "messages"}
    assert check_columns(row, HERE, source(**data)) == []
    return make_example(row, HERE, source(**data), None, False)


def refused(row, *words, **data):
    with pytest.raises(UserError) as caught:
        example(row, **data)
    error = caught.value
    assert error.where == HERE and error.fix
    assert all(word in f"{error.what} {error.fix}" for word in words), str(error)
    return error


# Forms

SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]
PARTS = [says(turn["role"], [{"type": "text", "text": turn["content"]}]) for turn in TALK]
FORMS = {
    "messages": {"messages": TALK},
    "JSON text": {"messages": json.dumps(TALK)},
    "sharegpt": {"conversations": SHAREGPT},
    "sharegpt in messages": {"messages": SHAREGPT},
    "conversation": {"conversation": TALK},
    "prompt and completion": {"prompt": TALK[:1], "completion": TALK[1:]},
    "prompt and response": {"prompt": TALK[:1], "response": TALK[1:]},
    "completion as text": {"prompt": TALK[:1], "completion": "world"},
    "response as text": {"prompt": TALK[:1], "response": "world"},
    "fields without a value": {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TALK]},
    "tuples": {"messages": tuple(TALK)},
}


@pytest.mark.parametrize("format", ["messages", "prompt_completion"])
@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_recognised_in_every_form(form, format):
    found = example(FORMS[form], format=format)
    assert found.turns == TALK and found.is_chat and not found.untrained
    plain = form in ("messages", "fields without a value", "tuples") and format == "messages"
    assert (found.form is None) == plain  # what is recognised is said


def test_parts_stay_parts_and_other_kinds_are_refused_by_name():
    found = example({"messages": PARTS})
    assert found.turns == PARTS and found.form
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "audio"}, 3):
        kind = part["type"] if isinstance(part, dict) else "part"
        refused({"messages": [says("user", [part]), TALK[1]]}, kind)
    refused({"messages": TALK, "images": ["cat.png"]}, "images")


def test_named_columns_are_taken_and_no_others():
    chat = {"format": "messages", "columns": {"messages": "chat"}}
    assert example({"chat": TALK, "messages": CALLS}, **chat).turns == TALK
    (error,) = check_columns({"messages": TALK}, HERE, source(**chat))
    assert "data.columns.messages" in error.fix
    assert check_columns({"prompt": TALK[:1], "completion": TALK[1:]}, HERE, source(**chat))
    both = {"messages": CALLS, "prompt": TALK[:1], "completion": TALK[1:]}
    assert example(both).turns == CALLS
    columns = {"prompt": "ask", "response": "answer"}
    assert example({"ask": TALK[:1], "answer": TALK[1:]}, columns=columns).turns == TALK
    assert check_columns({"messages": TALK}, HERE, source(columns=columns))
    row = {"prompt": "a", "response": "b", "messages": TALK}  # what the format needs is there
    assert example(row, format="prompt_completion").turns == [says("user", "a"), says("assistant", "b")]


def test_a_conversation_needs_the_chat_template():
    refused({"messages": TALK}, "data.chat_template=true", chat_template=False)


def test_what_the_assistant_says_in_a_prompt_is_not_trained_on():
    talk = [*TALK, says("user", "more")]
    found = example({"prompt": talk, "completion": [says("assistant", "no")]})
    assert (
        found.turns == [*talk, says("assistant", "no")]
        and found.untrained >= {1}
        and 3 not in found.untrained
    )


def test_the_roles_of_sharegpt():
    turns = [*SHAREGPT[:1], {"from": "function_call", "value": json.dumps(CALL["function"])}]
    turns += [{"from": "observation", "value": "4"}, SHAREGPT[1]]
    found = example({"conversations": turns, "system": "be kind", "tools": "[]"})
    assert [turn["role"] for turn in found.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.turns[0]["content"] == "be kind" and found.tools is None
    (call,) = found.turns[2]["tool_calls"]
    assert call["function"] == CALL["function"] and "content" not in found.turns[2]
    error = refused({"conversations": [*SHAREGPT[:1], *SHAREGPT], "system": "be kind"})
    assert "messages 1 and 2" in error.what  # as the row counts them
    masked = example({"conversations": [SHAREGPT[0], {**SHAREGPT[1], "weight": 0}], "system": "be kind"})
    assert masked.untrained == {2}


# What belongs to a message


def test_whole_messages_are_kept():
    talk = [says("user", "a", name="ann"), says("assistant", "b", reasoning_content="hm", mood="glad")]
    assert example({"messages": talk}).turns == talk
    found = example({"messages": CALLS, "tools": [{"type": "function"}], "documents": [{"text": "d"}]})
    assert (
        found.turns == CALLS and found.tools == [{"type": "function"}] and found.documents == [{"text": "d"}]
    )


@pytest.mark.parametrize("content", ["", None, "absent"])
@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL]), [json.dumps(CALL)], [CALL["function"]]])
def test_calls_in_every_form(content, calls):
    message = {"role": "assistant", "tool_calls": calls} | (
        {} if content == "absent" else {"content": content}
    )
    (call,) = example({"messages": [CALLS[0], message]}).turns[1]["tool_calls"]
    assert call["function"] == CALL["function"] and call["type"] == "function"
    message["tool_calls"] = [{"function": {"name": "sum", "arguments": '{"a": 2}'}}]
    (call,) = example({"messages": [CALLS[0], message]}).turns[1]["tool_calls"]
    assert call["function"] == CALL["function"]
    message = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "sum", "arguments": '{"a": 2}'},
    }
    (call,) = example({"messages": [CALLS[0], message]}).turns[1]["tool_calls"]
    assert call["function"] == CALL["function"]


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_as_json_text(name):
    for value in ([{"a": 1}], '[{"a": 1}]', ['{"a": 1}'], {"a": 1}, '{"a": 1}'):
        assert getattr(example({"messages": TALK, name: value}), name) == [{"a": 1}]
    for value in (None, "", " ", [], float("nan")):
        assert getattr(example({"messages": TALK, name: value}), name) is None
    for value in ("get_weather(city)", '["a"]', [1], 3, DEEP):
        refused({"messages": TALK, name: value}, name)
    refused({"messages": TALK, name: [{"a": "\ud83d"}]}, "position 0")


def test_ids_of_calls_that_are_numbers():
    talk = [CALLS[0], *calls({**CALL, "id": 7}), says("tool", "4", tool_call_id=7), TALK[1]]
    found = example({"messages": talk})
    assert found.turns[1]["tool_calls"][0]["id"] == found.turns[2]["tool_call_id"] == "7"
    talk[2] = {**talk[2], "tool_call_id": 8}
    refused({"messages": talk}, "message 3")


def test_turns_of_no_weight():
    for mask in ({"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}):
        found = example({"messages": [TALK[0], {**TALK[1], **mask}]})
        assert found.untrained == {1} and found.turns == TALK
    for mask in ({"weight": 1}, {"train": True}, {"weight": 1.0}):
        found = example({"messages": [TALK[0], {**TALK[1], **mask}]})
        assert not found.untrained and found.turns == TALK
    found = example({"messages": [{**TALK[0], "weight": 0}, {**TALK[1], "weight": None}]})
    assert not found.untrained and found.turns == TALK
    for mask in ({"weight": 0.5}, {"train": "no"}, {"weight": 2}):
        refused({"messages": [TALK[0], {**TALK[1], **mask}]}, next(iter(mask)), "message 2")


# What is wrong with one


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([TALK[0], TALK[0], TALK[1]], ["messages 1 and 2"]),
        ([*TALK, TALK[1]], ["messages 2 and 3"]),
        ([TALK[0], says("tool", "4"), TALK[1]], ["message 2", "tool_calls"]),
        ([*TALK, says("tool", "4"), TALK[1]], ["message 3", "tool_calls"]),
        ([*CALLS[:2], says("tool", "4", tool_call_id="b2"), CALLS[3]], ["message 3", "'b2'"]),
        ([TALK[0], {"role": "assistant", "tool_calls": [{"function": {}}]}], ["message 2", "name"]),
        ([{"rol": "user", "content": "a"}, TALK[1]], ["message 1", "did you mean role"]),
        ([{"role": "user", "contnt": "a"}, TALK[1]], ["message 1", "did you mean content"]),
        ([says("user", 3), TALK[1]], ["message 1"]),
        ([says("user", "\udc00"), TALK[1]], ["position 0"]),
        ([says("assistant", [{"type": "text", "text": "\udc00"}])], ["position 0"]),
        (calls({"name": "f", "arguments": {"a": ["\ud83d"]}}), ["position 0"]),
        (calls({"name": "f", "arguments": {"\ud83d": 1}}), ["position 0"]),
        (calls({"name": "f", "arguments": DEEP}) * 2, ["messages 1 and 2"]),
        (calls({**CALL, "id": ["a"]}), ["message 1", "['a']"]),
        ([says("assistant", None, tool_calls=DEEP)], ["JSON", "deep"]),
        ([says("assistant", None, tool_calls=3)], ["message 1", "tool_calls"]),
        ([*CALLS[:2], says("tool", "4", tool_call_id={}), CALLS[3]], ["message 3", "{}"]),
        ([says("assistant", "4", reasoning_content=["a"])], ["message 1", "reasoning_content"]),
        (DEEP, ["JSON", "deep"]),
        ("hello", ["JSON"]),
        ('{"role": "user"', ["JSON"]),
        ('{"role": "user"}', ["list"]),
        ({"role": "user"}, ["list"]),
        ([1], ["list"]),
    ],
)
def test_what_could_not_have_been_said_is_refused(talk, words):
    refused({"messages": talk}, *words)


@pytest.mark.parametrize(
    "talk", [[], TALK[:1], [TALK[0], says("assistant", " ")], None, "", [says("system", "s"), TALK[0]]]
)
def test_a_conversation_in_which_the_assistant_says_nothing_is_an_empty_row(talk):
    assert isinstance(refused({"messages": talk}, "data.empty_rows=drop"), EmptyRow)


def test_roles_in_other_letters_and_roles_that_nobody_knows():
    found = example({"messages": [says("User", "hello"), says(" ASSISTANT", "world")]})
    assert found.turns == TALK and "'User'" in found.form
    assert not isinstance(refused({"messages": [says("me", "a"), says("bot2", "b")]}, "'bot2'"), EmptyRow)


def test_what_of_a_conversation_is_not_learnt_is_said():
    found = example({"messages": [*TALK, says("user", "more")]})
    assert found.turns == TALK and "left out" in found.form
    silent = [TALK[0], says("assistant", " "), *TALK]
    found = example({"messages": silent})
    assert found.turns == silent and "not learnt" in found.form


def test_calls_in_the_text_and_speakers_with_names_are_possible():
    text = says("assistant", "<tool_call>{}</tool_call>")
    assert len(example({"messages": [CALLS[0], text, *CALLS[2:]]}).turns) == 4
    both = [says("user", "a", name="ann"), says("user", "b", name="bob"), TALK[1]]
    assert example({"messages": both}).turns == both
    several = [CALLS[0], {**CALLS[1], "tool_calls": [CALL, {**CALL, "id": "b2"}]}, CALLS[2]]
    several += [says("tool", "5", tool_call_id="b2"), CALLS[3]]
    assert example({"messages": several}).turns == several
