"""The chat template of a tokenizer: conversations as text, with the options of a recipe and a fixed date.

Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from datetime import datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any

from speft_ds.config.data_config import DataConfig
from speft_ds.data.conversations import REASONING, Example, Message
from speft_ds.errors import UserError
from speft_ds.untrusted import cpu_limit

TEMPLATE_S = 5.0  # of CPU time, for a chat template to write some conversations
PROBE = "Wxq7probe"  # a text that no template writes by itself
NUM_PROBED = 100  # rows in which it is looked whether the template reads a field
_DATE = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def writes_date(folder: Path | None) -> bool:
    """Whether a model's chat template writes today's date; True where its folder is not there to be read."""
    if folder is None:
        return True
    files = [*folder.glob("chat_template*"), *folder.glob("*_templates/*.jinja")]
    files = [file for file in (*files, folder / "tokenizer_config.json") if file.is_file()]
    return any("strftime_now" in file.read_text(encoding="utf-8", errors="replace") for file in files)


def with_date(template: str, date: Date) -> str:
    """A chat template that writes this day in place of today's."""
    midnight = datetime.combine(date, time())
    return _DATE.sub(lambda call: json.dumps(midnight.strftime(call[2])), template)


def fix_date(tokenizer: Any, date: Date) -> None:
    """Have the chat templates of a tokenizer write this day, whoever renders them: lm-eval does, too."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        tokenizer.chat_template = {name: with_date(template, date) for name, template in found.items()}
    elif found:
        tokenizer.chat_template = with_date(found, date)


@dataclass
class ChatTemplate:
    """What writes conversations, and what there is to say of those that it has written.

    Attributes:
        data: its options and system prompt.
        date: what it takes for today.
        said: what a user should know, once each; see `notes`.
    """

    tokenizer: Any
    data: DataConfig
    date: Date = field(default_factory=Date.today)
    said: dict[str, str] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)  # fields
    _probed: dict[str, tuple[int, str]] = field(default_factory=dict)  # field -> rows, where the first one is
    _roles: set[str] = field(default_factory=set)  # that it is known to write

    def notes(self) -> list[str]:
        """What a user should know of the rows so far, a line each."""
        unread = [
            f"the chat template does not read {name!r}, which {number:,} rows have, first {where}"
            for name, (number, where) in self._probed.items()
            if name not in self._read
        ]
        return [*self.said.values(), *unread]

    def reads(self, name: str) -> bool:
        """Whether a field of the rows so far has made a difference to what the template writes."""
        return name in self._read

    def mark_read(self, names: Sequence[str]) -> None:
        """Count fields as read that are written beside the template."""
        self._read |= set(names)

    # Rendering

    def render(
        self, turns: list[Message], example: Example, where: str, prompt: bool = False, **options: Any
    ) -> str:
        """Turns as text; `prompt`: up to where the assistant is to answer. Raises UserError: refused."""
        try:
            return self.apply([turns], example, prompt, **options)[0]
        except Exception as error:  # a template is a program that may raise what it likes
            fix = "change the row, or data.chat_template=false"
            raise UserError(f"the tokenizer's chat template refuses the row: {error}", where, fix) from error

    def apply(
        self,
        conversations: list[list[Message]],
        example: Example | None = None,
        prompt: bool = False,
        **options: Any,
    ) -> list[str]:
        """Several conversations as text, with the tools and documents of an example; raises anything."""
        if not conversations:
            return []
        options = {"tools": getattr(example, "tools", None), **self._options(example), **options}
        template = self._written(options["tools"])
        return self.tokenizer.apply_chat_template(
            conversations, chat_template=template, add_generation_prompt=prompt, tokenize=False, **options
        )

    def spans(self, turns: list[Message], example: Example) -> list[tuple[int, int]] | None:
        """[start, stop) of the characters between `{% generation %}` marks; None: the template has none."""
        template = self._written(example.tools)
        if not _MARKS.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, **self._options(example), "tools": example.tools}
        with cpu_limit(TEMPLATE_S):
            _, (spans,) = render_jinja_template(
                [turns], chat_template=template, return_assistant_tokens_mask=True, **options
            )
        return spans

    def _options(self, example: Example | None) -> dict[str, Any]:
        return {"documents": getattr(example, "documents", None), **(self.data.chat_template_kwargs or {})}

    def _written(self, tools: list[dict] | None) -> str:
        """The template, with the date of the run in place of today's."""
        if bool(tools) not in self._templates:
            template = self.tokenizer.get_chat_template(None, tools)
            self._templates[bool(tools)] = with_date(template, self.date)
        return self._templates[bool(tools)]

    @cached_property
    def _templates(self) -> dict[bool, str]:
        return {}

    # The turns of a row as the template takes them

    def prepare(self, example: Example, where: str) -> list[Message]:
        """The turns of an example as the template takes them: system prompt, contents, calls.

        Raises:
            UserError: there is no template, it has no such option, or it leaves a turn out.
        """
        self._check()
        turns = [dict(turn) for turn in example.turns]
        if turns[0]["role"] != "system" and self._own_system is not None:
            turns.insert(0, {"role": "system", "content": self._own_system})
        if turns[0]["role"] == "system" and not self._takes_system:
            turns = self._without_system(turns, where)
        turns = self._accepted(self._in_form(turns), example)
        for role in {turn["role"] for turn in turns} - self._roles:
            self._check_role(role, turns, example, where)
        self._look_for_fields(turns, example, where)
        return turns

    def _check(self) -> None:
        if not self.tokenizer.chat_template:
            fix = "data.chat_template=false or, for conversations, a model that has one"
            raise UserError("the tokenizer has no chat template", "data.chat_template", fix)
        template = self._written(None)
        for name in self.data.chat_template_kwargs or ():
            if not re.search(rf"\b{re.escape(name)}\b", template):
                what = f"the chat template reads no option {name!r}"
                raise UserError(what, "data.chat_template_kwargs", f"remove {name}, or correct its name")
        if "strftime_now(" in template:
            what = "the chat template makes up the format of the date that it writes: it cannot be kept"
            raise UserError(what, "data.chat_template", "write the format out: strftime_now('%Y-%m-%d')")

    def _in_form(self, turns: list[Message]) -> list[Message]:
        """Contents as texts where the template writes those, as parts where it writes parts alone."""
        takes_text, takes_parts = self._contents
        changed = []
        for turn in turns:
            content = turn.get("content")
            if isinstance(content, list) and not takes_parts:
                turn = {**turn, "content": text_of(turn)}
            elif isinstance(content, str) and takes_parts and not takes_text:
                turn = {**turn, "content": [{"type": "text", "text": content}]}
            changed.append(turn)
        return changed

    @cached_property
    def _contents(self) -> tuple[bool, bool]:
        """Whether the template writes contents that are texts, and that are parts, as well as texts."""
        written = []
        for content in (PROBE, [{"type": "text", "text": PROBE}]):
            try:
                written += self.apply([[{"role": "user", "content": content}]])
            except Exception:
                written.append("")
        takes_text = PROBE in written[0]
        return takes_text, written[0] == written[1] if takes_text else PROBE in written[1]

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes a system turn, and does not refuse it."""
        turns = [{"role": "system", "content": PROBE}, {"role": "user", "content": "x"}]
        try:
            return PROBE in self.apply([self._in_form(turns)], prompt=True)[0]
        except Exception:
            return False

    @cached_property
    def _own_system(self) -> str | None:
        """The system prompt of conversations without one; None: the template's own."""
        system = self.data.system
        if system is None or system.strip():
            return system
        user = {"role": "user", "content": "x"}
        conversations = [
            self._in_form(turns) for turns in ([user], [{"role": "system", "content": ""}, user])
        ]
        try:  # some write a prompt of their own unless there is an empty one
            alone, empty = self.apply(conversations, prompt=True)
        except Exception:
            return None
        return "" if len(empty) < len(alone) else None

    def _without_system(self, turns: list[Message], where: str) -> list[Message]:
        """The system prompt at the start of the first user's turn."""
        system, *turns = turns
        if not text_of(system).strip():
            return turns
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            fix = "put a user's turn before the assistant's"
            raise UserError("the chat template has no place for the system prompt", where, fix)
        first["content"] = f"{text_of(system)}\n\n{text_of(first)}"
        what = "the chat template has no system turn: system prompts stand in the first user's turn"
        self.said["system"] = what
        return turns

    def _accepted(self, turns: list[Message], example: Example) -> list[Message]:
        """The turns with calls as the template takes them: of older ones, arguments are text."""
        if not any(turn.get("tool_calls") for turn in turns):
            return turns
        filled = self._in_form([{**turn, "content": turn.get("content", "")} for turn in turns])
        for spelling in (turns, _with_text_arguments(turns), filled, _with_text_arguments(filled)):
            try:
                self.apply([spelling], example)
            except Exception:
                continue
            return spelling
        return filled

    def _check_role(self, role: str, turns: list[Message], example: Example, where: str) -> None:
        """Refuse a role that the template leaves out of the text."""
        of_role = [n for n, turn in enumerate(turns) if turn["role"] == role and not turn.get("tool_calls")]
        number = next((n for n in of_role if turns[n].get("content")), None)
        if number is None:
            return
        probe = self._in_form([{**turns[number], "content": PROBE}])
        try:
            (text,) = self.apply([[*turns[:number], *probe, *turns[number + 1 :]]], example)
        except Exception:  # it says so when the row itself is rendered
            return
        if PROBE not in text:
            fix = "delete these turns, or train with another chat template"
            raise UserError(f"the chat template writes nothing of a turn of role {role!r}", where, fix)
        self._roles.add(role)

    def _look_for_fields(self, turns: list[Message], example: Example, where: str) -> None:
        """Find out which fields of a row the template reads: without those it writes something else."""
        names = {name for turn in turns for name in turn} - {"role", "content"}
        names |= {name for name in ("tools", "documents") if getattr(example, name)}
        for name in sorted(names - self._read):
            number, first = self._probed.get(name, (0, where))
            self._probed[name] = number + 1, first
            if number < NUM_PROBED and self._changes_text(name, turns, example):
                self._read |= set(REASONING) if name in REASONING else {name}

    def _changes_text(self, name: str, turns: list[Message], example: Example) -> bool:
        holders = [number for number, turn in enumerate(turns) if name in turn]
        part = turns[: holders[-1] + 1] if holders else turns
        less = [{key: value for key, value in turn.items() if key != name} for turn in part]
        without = {} if holders else {name: None}
        try:
            return self.apply([part], example) != self.apply([less], example, **without)
        except Exception:  # without it the template refuses the row
            return True


def text_of(turn: Message) -> str:
    """What a turn says, as one text."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_text_arguments(turns: list[Message]) -> list[Message]:
    def as_text(call: dict) -> dict:
        arguments = call["function"].get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": written}}

    calls = [[as_text(call) for call in turn.get("tool_calls", ())] for turn in turns]
    return [{**turn, "tool_calls": own} if own else turn for turn, own in zip(turns, calls, strict=True)]
