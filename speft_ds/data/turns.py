"""The texts that a conversation is trained on, cut where the assistant begins and ends, as at inference.

Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from speft_ds.data.chat_template import ChatTemplate, text_of
from speft_ds.data.conversations import REASONING, Example, Message, says_something
from speft_ds.errors import UserError

Pieces = list[tuple[str, bool]]  # text, and whether the loss is on it
NUM_EXACT = 4  # turns of the assistant up to which every start of a conversation is rendered
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A text to train on.

    Attributes:
        pieces: it, cut where the loss begins and ends.
        end: number of the turn, as the row has them, that it ends with.
        num_turns: how many of the assistant's turns are learnt in it.
        is_marked: the template itself marks what the assistant generates: the loss is on that and no more.
    """

    pieces: Pieces
    end: int = 0
    num_turns: int = 1
    is_marked: bool = False


@dataclass
class Turns:
    """What makes texts of conversations: one, or one per turn of the assistant, as `data.turns` says.

    Where a template writes a conversation's start otherwise once it goes on (earlier thoughts left out, an
    EOS only at the end), a text with all turns would not be what the model sees at inference.
    """

    template: ChatTemplate
    num_rows: Counter = field(default_factory=Counter)  # (together?, what: conversations or rows) -> number

    def rows(self, example: Example, where: str, is_apart: bool = False) -> list[Rendered]:
        """The texts of an example; empty where there is nothing to learn.

        Args:
            where: it stands, for errors.
            is_apart: with `data.turns=auto`, one text per turn in any case.
        Raises:
            UserError: the template refuses the row, leaves a part of it out, or does not separate a prompt
                from its response; `data.turns=together` with a template that cannot do that.
        """
        turns = self.template.prepare(example, where)
        shift = len(turns) - len(example.turns)  # a system turn more, or one less
        talk = _Conversation(self.template, turns, example, where, shift)
        if example.label is not None:
            return [Rendered([(talk.start(len(turns)), False)], len(example.turns) - 1)]
        trained = [number for number in range(len(turns)) if talk.is_trained(number)]
        if not trained:
            return []
        how, pieces = self.template.data.turns, None
        if how in ("auto", "together") and len(trained) > 1 and not is_apart:
            pieces = talk.in_one(trained)
            if pieces is None and how == "together":
                what = "the chat template writes a conversation's start otherwise once it goes on"
                fix = "data.turns=auto, which makes a row of every turn of the assistant"
                raise UserError(f"{what}: it cannot be one row", where, fix)
        if pieces is not None:
            return [replace(talk.marked(pieces, trained[-1]), num_turns=len(trained))]
        return [talk.of_turn(number) for number in (trained[-1:] if how == "last" else trained)]

    def count(self, rows: list[Rendered]) -> None:
        """Count the rows that a conversation became, for the notes."""
        is_one = rows[0].num_turns > 1
        if is_one or len(rows) > 1:
            self.num_rows[is_one, "conversations"] += 1
            self.num_rows[is_one, "rows"] += len(rows)

    def notes(self) -> list[str]:
        """What a user should know of the rows so far, a line each."""
        how, lines = self.template.data.turns, []
        for is_one in (True, False):
            if number := self.num_rows[is_one, "conversations"]:
                why = "one per turn of the assistant"
                if how == "auto":
                    why += ": in one, the model would not read all of them as at inference"
                num_rows = self.num_rows[is_one, "rows"]
                rows = f"{number:,} conversations of several turns make {num_rows:,} rows"
                lines.append(f"data.turns={how}: {rows}, {'all turns together' if is_one else why}")
        return [*lines, *self.template.notes()]


@dataclass(frozen=True)
class _Conversation:
    """The prepared turns of one row; `shift`: how many more they are than the row has."""

    template: ChatTemplate
    turns: list[Message]
    example: Example
    where: str
    shift: int

    def start(self, number: int, prompt: bool = False, **options) -> str:
        """The first turns as text; `prompt`: with what asks the assistant to answer."""
        if not number:
            return ""
        return self.template.render(self.turns[:number], self.example, self.where, prompt, **options)

    def is_trained(self, number: int) -> bool:
        turn = self.turns[number]
        if turn["role"] != "assistant" or number - self.shift in self.example.untrained:
            return False
        # Of a turn whose calls the template does not write, silence would be learnt.
        has_text = bool(text_of(turn).strip()) or not turn.get("tool_calls")
        return says_something(turn) and (has_text or self.template.reads("tool_calls"))

    def of_turn(self, number: int) -> Rendered:
        """The row of one turn: its prompt as at inference, and what the assistant says."""
        prompt, spoken = self.start(number, prompt=True), self.start(number + 1)
        if spoken.startswith(prompt):
            return self.marked([(prompt, False), (spoken[len(prompt) :], True)], number)
        pieces = self._behind_thought(prompt, spoken, number) or self._by_thinking(number)
        if pieces is None:
            what = f"the chat template writes no answer behind its prompt, which ends with {prompt[-40:]!r}"
            fix = "data.chat_template_kwargs that suit the rows, or another chat template"
            raise UserError(what, self.where, fix)
        return Rendered(pieces, number - self.shift)

    def _behind_thought(self, prompt: str, spoken: str, number: int) -> Pieces | None:
        """The pieces where a prompt opens a thought, which the template leaves out of finished turns."""
        pairs = enumerate(zip(prompt, spoken, strict=False))
        shared = next((place for place, (a, b) in pairs if a != b), min(len(prompt), len(spoken)))
        tag = prompt.rfind("<", 0, shared)
        if tag >= 0 and ">" not in prompt[tag:shared]:
            shared = tag  # two tags that begin alike
        opened, rest, turn = prompt[shared:], spoken[shared:], self.turns[number]
        if opened.strip() not in ("", "<think>"):
            return None
        if prompt.rstrip().endswith("<think>"):
            inline = _THOUGHT.search(text_of(turn))
            thought = next((turn[name] for name in REASONING if turn.get(name)), inline and inline[1])
            self.template.mark_read(REASONING)
            closing = "" if rest.lstrip().startswith("</think>") else "\n</think>\n\n"
            rest = f"{thought.strip() if thought else ''}{closing}{rest.lstrip()}"
        what = "the chat template's prompt is not how it begins a finished turn: rows have that prompt"
        self.template.said["prompt"] = f"{what}, and close the thought that it opens"
        return [(prompt, False), (rest, True)]

    def _by_thinking(self, number: int) -> Pieces | None:
        """The pieces where the template separates them for a model that thinks, or one that does not."""
        option = "enable_thinking"
        if option in (self.template.data.chat_template_kwargs or ()):
            return None
        thinks = any(self.turns[number].get(name) for name in REASONING)
        prompt, spoken = (
            self.start(number + 1 - is_prompt, bool(is_prompt), **{option: thinks}) for is_prompt in (1, 0)
        )
        if not spoken.startswith(prompt):
            return None
        written, which = str(thinks).lower(), "with" if thinks else "without"
        what = f"rows {which} reasoning have the prompt of {option}={written}: ask the model so"
        self.template.said[f"{option}={written}"] = what
        return [(prompt, False), (spoken[len(prompt) :], True)]

    def in_one(self, trained: Sequence[int]) -> Pieces | None:
        """All turns in one text; None where a prompt at inference is not how it begins."""
        stop = trained[-1] + 1
        complete, prompt = self.start(stop), self.start(stop - 1, prompt=True)
        if not complete.startswith(prompt):
            return None
        ends = [number for number in range(stop) if self.turns[number]["role"] == "assistant"]
        pieces = self._by_blocks(ends) if len(ends) > NUM_EXACT else None
        if pieces and "".join(text for text, _ in pieces) == complete == prompt + pieces[-1][0]:
            is_own = (number in trained for number in ends for _ in range(2))
            return [(text, is_said and own) for (text, is_said), own in zip(pieces, is_own, strict=True)]
        pieces, text = [], ""
        for number in trained:
            prompt = self.start(number, prompt=True)
            spoken = complete if number + 1 == stop else self.start(number + 1)
            if not (prompt.startswith(text) and spoken.startswith(prompt) and complete.startswith(spoken)):
                return None
            pieces += [(prompt[len(text) :], False), (spoken[len(prompt) :], True)]
            text = spoken
        return pieces

    def _by_blocks(self, ends: Sequence[int]) -> Pieces | None:
        """What the assistant's turns, each with what is before it, add to a text: by the neighbours alone.

        To render every start of a conversation would be quadratic. A block is what stands up to and with a
        turn of the assistant; it is rendered behind the user's and the assistant's turns before it. Whether
        the blocks are the complete text is for the caller to see.
        """
        befores, prompts, spoken, start = [], [], [], 0
        for end in ends:
            before = self.turns[start - 1 : start] if start else []
            users = (turn for turn in reversed(self.turns[: max(0, start - 1)]) if turn["role"] == "user")
            befores.append([*([user] if (user := next(users, None)) else []), *before])
            prompts.append([*befores[-1], *self.turns[start:end]])
            spoken.append([*prompts[-1], self.turns[end]])
            start = end + 1
        apply, example = self.template.apply, self.example
        try:
            texts = ["", *apply(befores[1:])]
            prompt_texts = [*apply(prompts[:1], example, True), *apply(prompts[1:], prompt=True)]
            spoken_texts = [*apply(spoken[:1], example), *apply(spoken[1:])]
        except Exception:  # a template may refuse a part of a conversation
            return None
        pieces: Pieces = []
        for before, prompt, text in zip(texts, prompt_texts, spoken_texts, strict=True):
            if not prompt.startswith(before) or not text.startswith(prompt):
                return None
            pieces += [(prompt[len(before) :], False), (text[len(prompt) :], True)]
        return pieces

    def marked(self, pieces: Pieces, number: int) -> Rendered:
        """The pieces up to a turn, with the loss only where the template's own marks have it, too."""
        spans = self.template.spans(self.turns[: number + 1], self.example)
        if not spans:
            return Rendered(pieces, number - self.shift)
        found: Pieces = []
        start = 0
        for piece, is_label in pieces:
            stop = start + len(piece)
            inside = {min(max(place, start), stop) for span in spans for place in span} if is_label else set()
            for first, last in pairwise(sorted({start, stop, *inside})):
                is_own = is_label and any(a <= first and last <= b for a, b in spans)
                found.append((piece[first - start : last - start], is_own))
            start = stop
        return Rendered(found, number - self.shift, is_marked=True)
