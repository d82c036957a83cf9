"""Conversations: the forms that data sets hold them in, as the messages that chat templates take.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from speft_ds.config.data_config import Columns, Source
from speft_ds.errors import UserError, closest
from speft_ds.io import decode_json

Message = dict[str, Any]
COLUMNS = ("messages", "conversations", "conversation")  # where data sets keep a conversation
COMPLETION = "completion"  # TRL's name of the column that continues `prompt`
# ShareGPT's names of roles -> those of chat templates
ROLES = {"human": "user", "observation": "tool", "function": "tool"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant")
KNOWN = {"user", "assistant", "system", "tool", "developer"}
CALL = "function_call"  # of ShareGPT a role, of the older OpenAI format a field
MASKS = ("weight", "train", "training", "loss")  # fields that say whether the loss is on a turn
REASONING = ("reasoning_content", "thinking", "reasoning")
CALLS = '"tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
COMPLETE = "complete or delete the row, or drop all such rows: data.empty_rows=drop"
LIKE = 'like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


class EmptyRow(UserError):
    """A row without a prompt or without a response."""


@dataclass(frozen=True)
class Example:
    """One row as a conversation; the loss is on what the assistant says, or on the label.

    Attributes:
        turns: messages in order, as a chat template takes them. Plain text: a user's turn, an assistant's.
        is_chat: whether the tokenizer's chat template goes around the turns.
        label: the class, for sequence classification: then there is no assistant's turn.
        untrained: numbers of the assistant's turns that the loss is not on.
        tools, documents: what else the chat template gets; None: nothing.
        form: how the row holds its conversation, where that is not the one that its format names, and what
            of it is left out.
    """

    turns: list[Message]
    is_chat: bool
    label: int | None = None
    untrained: frozenset[int] = frozenset()
    tools: list[dict] | None = None
    documents: list[dict] | None = None
    form: str | None = field(default=None, compare=False)


def conversation_columns(row: dict, source: Source) -> Sequence[str]:
    """The columns of a row that hold messages: one, a prompt's and its completion's, or none."""
    named, prompt = source.columns, source.columns.prompt
    if source.format not in ("messages", "prompt_completion") or source.template is not None:
        return ()
    if source.format == "messages" and named.messages in row:
        return (named.messages,)
    # Where the recipe names a column, one with a typing error is not to be replaced by another.
    is_named = named not in (Columns(), Columns(input=None))
    completion = next((name for name in (named.response, COMPLETION) if name in row), None)
    is_pair = completion is not None and isinstance(row.get(prompt), list | tuple)
    if is_pair and not (is_named and source.format == "messages"):
        return prompt, completion
    if is_named or (source.format != "messages" and prompt in row):
        return ()
    return tuple(name for name in COLUMNS if name in row)[:1]


def read_conversation(row: dict, columns: Sequence[str], where: str, source: Source) -> Example:
    """The conversation in these columns of a row, checked, and cut after what the assistant says last.

    Raises:
        EmptyRow: the assistant says nothing.
        UserError: what is not a conversation, or one that could not have been held.
    """
    if not source.chat_template:
        what = "the row is a conversation, which is written by the tokenizer's chat template"
        raise UserError(what, where, "data.chat_template=true")
    if row.get("images") or row.get("image"):
        raise UserError("the row has images", where, "train on rows of text alone")
    turns, untrained, forms = [], set(), _forms(columns, source)
    for column in columns:
        # What the assistant says in a prompt was given.
        untrained |= {number for number, turn in enumerate(turns) if turn["role"] == "assistant"}
        raw, form = _list_of_objects(row[column], column, where, is_completion=bool(turns))
        forms.append(form)
        for message in raw:
            turn, is_trained, form = _message(message, len(turns) + 1, where)
            untrained |= {len(turns)} if turn["role"] == "assistant" and not is_trained else set()
            turns.append(turn)
            forms.append(form)
    num_turns, roles = len(turns), {turn["role"] for turn in turns}
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if roles - KNOWN and "assistant" not in roles:
        what = f"no turn is an assistant's; the roles are {', '.join(sorted(map(repr, roles)))}"
        raise UserError(what, where, f"name the roles {', '.join(sorted(KNOWN))}")
    says = [says_something(turn) for turn in turns if turn["role"] == "assistant"]
    if not any(says):
        raise EmptyRow("the conversation has nothing that an assistant says", where, COMPLETE)
    _check_order(turns, where)
    forms += ["turns at the end that nobody answers, left out"] if len(turns) < num_turns else []
    forms += ["turns of the assistant that are empty, not learnt"] if not all(says) else []
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": encodable(system, where)})
        untrained = {number + 1 for number in untrained}
        forms.append("column system")
    tools, documents = (_objects(row.get(name), name, where) for name in ("tools", "documents"))
    form = ", ".join(dict.fromkeys(filter(None, forms))) or None
    return Example(turns, True, None, frozenset(untrained), tools, documents, form)


def _forms(columns: Sequence[str], source: Source) -> list[str | None]:
    """What is to be said of the columns, where they are not those of the format."""
    if len(columns) > 1:
        return ["prompt and completion"]
    is_usual = source.format == "messages" and columns[0] == source.columns.messages
    return [] if is_usual else [f"column {columns[0]}"]


def says_something(turn: Message) -> bool:
    """Whether a turn of the assistant has anything to learn."""
    content = turn.get("content")
    has_content = bool(content.strip()) if isinstance(content, str) else bool(content)
    return has_content or bool(turn.get("tool_calls")) or any(turn.get(name) for name in REASONING)


def _list_of_objects(
    value: Any, column: str, where: str, is_completion: bool
) -> tuple[list[dict], str | None]:
    """Messages as a list, and the form that they are written in, if it is not that of `messages`."""
    form = None
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise EmptyRow(f"the row has an empty {column!r}", where, COMPLETE)
    if is_completion and isinstance(value, str):
        return [{"role": "assistant", "content": value}], form
    if isinstance(value, str):
        value, form = _from_json(value, column, where), "JSON text"
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{column!r} does not hold a list of objects", where, LIKE)
    return list(value), form


def _message(raw: dict, number: int, where: str) -> tuple[Message, bool, str | None]:
    """A message as chat templates take it, whether the loss may be on it, and its form."""
    # Tables write every field that some message has into all of them, without a value.
    turn, form = {key: value for key, value in raw.items() if value is not None}, None
    if "role" not in turn and "from" in turn:
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
        form = "ShareGPT (from, value)"
    role = turn.get("role")
    if not isinstance(role, str):
        near = closest("role", [str(key) for key in raw])
        more = f"; did you mean role for {near[0]}?" if near else ""
        raise UserError(f"message {number} has no role as text", where, f"{LIKE}{more}")
    plain = role.strip().lower()
    role = plain if plain in KNOWN or plain in ROLES else role
    form = form or (f"roles like {turn['role']!r}" if role != turn["role"] else None)
    turn["role"] = ROLES.get(role, role)
    masks = {key: turn.pop(key) for key in MASKS if key in turn}
    is_trained = all([_is_on(key, value, number, where) for key, value in masks.items()])
    if role == CALL:
        turn |= {"role": "assistant", "content": None, CALL: turn["content"]}
    _set_calls(turn, number, where)
    content = turn.get("content")
    if isinstance(content, list | tuple):
        turn["content"], form = _parts(content, number, where), form or "content parts"
    elif isinstance(content, dict) and turn["role"] == "tool":
        turn["content"] = json.dumps(content, ensure_ascii=False)
    elif content is None and "tool_calls" in turn:
        turn.pop("content", None)  # as apply_chat_template does: most templates would write "None"
    elif not isinstance(content, str):
        near = [key for key in closest("content", [str(key) for key in raw]) if key != "content"]
        more = f"; did you mean content for {near[0]}?" if near else ""
        raise UserError(f"message {number} ({role}) has no content as text", where, f"{LIKE}{more}")
    if other := [name for name in REASONING if not isinstance(turn.get(name, ""), str)]:
        raise UserError(f"message {number} has no text as {other[0]!r}", where, "write text there")
    if "tool_call_id" in turn:
        turn["tool_call_id"] = _as_id(turn["tool_call_id"], number, where)
    encodable(turn, where)
    return turn, is_trained, form


def _is_on(key: str, value: Any, number: int, where: str) -> bool:
    if value in (0, 1):  # booleans are, too
        return bool(value)
    what = f"message {number} has {key}={value!r}: a turn is trained on, or it is not"
    raise UserError(what, where, f'"{key}": 1 (or true) to train on it, 0 (or false) not to')


def _set_calls(turn: Message, number: int, where: str) -> None:
    """Write the calls of a message as chat templates take them: objects, with objects as arguments."""
    if CALL in turn and "tool_calls" not in turn:  # as OpenAI had it before, and ShareGPT has it
        turn["tool_calls"] = [turn.pop(CALL)]
    calls = turn.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = _from_json(calls, f"tool_calls of message {number}", where)
    if not calls:
        return
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list | tuple):
        raise UserError(f"tool_calls of message {number} are not a list", where, CALLS)
    calls = [_from_json(call, "a tool call", where) if isinstance(call, str) else call for call in calls]
    turn["tool_calls"] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"message {number} calls a tool without naming it", where, CALLS)
        if "arguments" in function:
            function = {**function, "arguments": _as_object(function["arguments"])}
        own = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        own |= {"id": _as_id(own["id"], number, where)} if "id" in own else {}
        kind = {} if "type" in own else {"type": "function"}
        turn["tool_calls"].append({**kind, **own, "function": function})  # in the row's order


def _as_id(value: Any, number: int, where: str) -> str:
    """The id of a tool's call, which is a text or may have been one."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"message {number} has {value!r:.50} as the id of a call", where, "write a text there")


def _as_object(arguments: Any) -> Any:
    """The arguments of a call, which the APIs send as JSON text and templates take as an object."""
    try:
        found = decode_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _parts(parts: Sequence[Any], number: int, where: str) -> list[dict]:
    found = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"message {number} has a part of type {kind!r}, of which only text can be trained on"
            raise UserError(what, where, 'keep parts like {"type": "text", "text": "..."}')
        found.append({"type": "text", "text": part["text"]})
    return found


def _check_order(turns: list[Message], where: str) -> None:
    """Refuse turns that could not have followed each other."""
    call_ids, may_answer = set(), False
    for number, (before, turn) in enumerate(zip([None, *turns], turns, strict=False), 1):
        role = turn["role"]
        if role == "tool":
            _check_result(turn, may_answer, call_ids, number, where)
            continue
        same_role = before is not None and before["role"] == role and before.get("name") == turn.get("name")
        if same_role and role in ("user", "assistant"):
            what = f"messages {number - 1} and {number} are both of the {role}: roles do not alternate"
            raise UserError(what, where, "join them to one message, or put back what is missing in between")
        calls = turn.get("tool_calls", ())
        call_ids |= {call["id"] for call in calls if "id" in call}
        # A call may also stand in the text, in marks of the model's own.
        may_answer = role == "assistant" and (bool(calls) or any(mark in str(turn) for mark in "<[("))


def _check_result(turn: Message, may_answer: bool, call_ids: set, number: int, where: str) -> None:
    own = turn.get("tool_call_id")
    if may_answer and (not call_ids or own is None or own in call_ids):
        return
    what = f"message {number} is a tool's result without a call" + ("" if own is None else f" of id {own!r}")
    raise UserError(what, where, f"the assistant's message before it needs {CALLS}")


def _objects(value: Any, column: str, where: str) -> list[dict] | None:
    """Tools or documents of a row: a list of objects, also as JSON text; None: there are none."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    value = _from_json(value, column, where) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        value = [value]
    found = [_from_json(item, column, where) if isinstance(item, str) else item for item in value]
    if not all(isinstance(item, dict) for item in found):
        fix = f"write {column} as a JSON list of objects"
        raise UserError(f"{column!r} is not a list of objects", where, fix)
    return encodable(found, where) or None


def _from_json(text: str, what: str, where: str) -> Any:
    try:
        return decode_json(text)
    except ValueError as error:
        fix = "write it as a list of objects, or as JSON text of one"
        raise UserError(f"{what} is text that is not JSON: {error}", where, fix) from None


def encodable(value: Any, where: str) -> Any:
    r"""A text, or lists and objects of them, as it is.

    Raises:
        UserError: it has half of a surrogate pair, like the JSON "\\ud83d" of a text that was cut.
    """
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            left += part
        elif isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                what = f"the text has half a character at position {error.start}: {part[error.start]!a}"
                raise UserError(what, where, "complete or delete it") from None
    return value
