"""Tokenisation: from a conversation to token ids, and which of them are label tokens.

The prompt's ids are those that it has when it stands alone, as at inference, so the loss starts exactly at
the response. There is one BOS where the model's tokenizer usually writes one, and the EOS after the last
response is a label token. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property, wraps
from pathlib import Path
from typing import NamedTuple

from speft_ds import hub
from speft_ds.config.data_config import DataConfig
from speft_ds.config.recipe import Recipe
from speft_ds.data.bad_rows import BadRows, report
from speft_ds.data.chat_template import TEMPLATE_S, ChatTemplate
from speft_ds.data.conversations import Example
from speft_ds.data.dataset import Row
from speft_ds.data.turns import Pieces, Rendered, Turns
from speft_ds.errors import UserError
from speft_ds.io import read_json
from speft_ds.untrusted import cpu_limit

_PROBE = "Hello  world, 12 \u00e9\n\u4e16 x"  # by which a loaded tokenizer is compared with SentencePiece
MIN_PROMPT = 4  # tokens that a cut prompt keeps; a row that would have fewer is left out
NO_LABELS = "nothing to learn, left out"
CUT_PROMPT, CUT_RESPONSE, TOO_LONG = "truncated prompt", "truncated response", "too long, left out"


def recipe_tokenizer(recipe: Recipe) -> object:
    """The tokenizer of a recipe's model, with the recipe's new tokens.

    Raises:
        UserError: see `load_tokenizer`; or it has one of the new tokens already.
    """
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.where("model.name_or_path"))
    if (wanted := recipe.model.add_tokens) is None:
        return tokenizer
    known = tokenizer.get_vocab()
    if there := [token for token in wanted if token in known]:
        what = f"the model's tokenizer has {', '.join(map(repr, there))} already"
        raise UserError(what, recipe.where("model.add_tokens"), "name tokens that are new")
    # Not normalized: found in a text as they are written here.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in wanted])
    return tokenizer


def load_tokenizer(name_or_path: str, where: str = "model.name_or_path") -> object:
    """The tokenizer of a model: a local folder or a hub id; `where` is where an error says it is named.

    Raises:
        UserError: transformers cannot load it, or would read a SentencePiece tokenizer.model, which stands
            alone, otherwise than SentencePiece.
    """
    from transformers import AutoTokenizer  # late: it takes seconds

    try:
        folder = hub.model_folder(name_or_path)
        names = {path.name for path in folder.iterdir()} if folder else set()
        if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
            tokenizer = _load_sentencepiece(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything: KeyError, RuntimeError
        fix = "the model's folder needs its tokenizer's files, as the hub has them"
        raise UserError(f"cannot load the tokenizer: {error}", where, fix) from error
    tokenizer.apply_chat_template = _in_time(tokenizer.apply_chat_template)
    return tokenizer


def _in_time(render: Callable) -> Callable:
    """A chat template is a program of the model's author: one that once took too long is not run again."""
    late: list[TimeoutError] = []

    @wraps(render)
    def render_in_time(*arguments: object, **options: object) -> object:
        if late:
            raise late[0]
        try:
            with cpu_limit(TEMPLATE_S):
                return render(*arguments, **options)
        except TimeoutError as error:
            late.append(error)
            raise

    return render_in_time


def _load_sentencepiece(folder: Path) -> object:
    """A tokenizer.model without a file that says what to make of it, as Meta gives Llama-2 away.

    AutoTokenizer leaves out the BOS and, for Llama, the space before the text: it would train, but worse.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer, LlamaTokenizer

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = [model.bos_id()] * (model.bos_id() >= 0) + model.encode(_PROBE)
    for kind in (AutoTokenizer, LlamaTokenizer):
        tokenizer = kind.from_pretrained(folder, add_bos_token=True, trust_remote_code=False)
        if tokenizer(_PROBE)["input_ids"] == expected:
            return tokenizer
    what = "transformers reads the tokenizer.model, which stands alone, otherwise than SentencePiece does"
    fix = "put tokenizer.json and tokenizer_config.json, as the hub has them, into the model's folder"
    raise UserError(what, str(folder), fix)


def stop_ids(tokenizer: object, model: str) -> frozenset[int]:
    """The tokens by which generation ends: EOS, and what the model's generation_config.json adds."""
    names = tokenizer.special_tokens_map
    named = [names[key] for key in ("eot_token", "eom_token") if isinstance(names.get(key), str)]
    found = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(named)}
    folder = hub.model_folder(model)
    try:
        own = read_json(folder / "generation_config.json").get("eos_token_id") if folder else None
    except (OSError, ValueError, AttributeError):  # there need not be one
        own = None
    found |= {number for number in (own if isinstance(own, list) else [own]) if isinstance(number, int)}
    return frozenset(found - {None})


def batches(
    examples: Iterable[tuple[str, Example | str]], num_characters: int = 2_000_000
) -> Iterator[list[tuple[str, Example | str]]]:
    """Examples (or why there is none) in lists of about so many characters, each tokenised in one call."""
    batch, size = [], 0
    for located in examples:
        batch.append(located)
        turns = located[1].turns if isinstance(located[1], Example) else ()
        size += 1 + sum(len(str(turn.get("content", ""))) for turn in turns)
        if size >= num_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Encoded(NamedTuple):
    """What became of an example: a row, or None and why; `end`: the number of the turn that it ends with."""

    row: Row | None
    change: str | None
    end: int = 0


@dataclass(frozen=True)
class Encoder:
    """What turns examples into rows, as the `data` section says.

    Attributes:
        stops: the tokens by which a model ends its turn, of `stop_ids`; EOS is one of them.
        date: that chat templates take for today.
        forms: `Example.form` of the rows so far -> how many have it.
        said: what else a user should know of the rows beside what `turns` says; see `notes`.
    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """

    tokenizer: object
    data: DataConfig
    stops: frozenset[int] = frozenset()
    date: Date = field(default_factory=Date.today)
    forms: Counter = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            fix = "set eos_token in the model's tokenizer_config.json"
            raise UserError("the tokenizer has no end-of-sequence token", "model.name_or_path", fix)

    @cached_property
    def turns(self) -> Turns:
        """What makes texts of conversations, and has something to say of the rows so far."""
        return Turns(ChatTemplate(self.tokenizer, self.data, self.date))

    def notes(self) -> list[str]:
        """What a user should know of the rows so far, a line each."""
        forms = [f"{form}: {number:,} rows" for form, number in self.forms.items()]
        return [*forms, *self.said.values(), *self.turns.notes()]

    def encode(self, examples: list[tuple[str, Example]], bad: BadRows | None = None) -> list[list[Encoded]]:
        """For each example its rows, several where each turn of it is one, and what was done to them.

        That is NO_LABELS, CUT_PROMPT, CUT_RESPONSE or TOO_LONG; None for a row as it is.

        Args:
            examples: where each stands, for errors, and what it is.
            bad: takes the errors of examples that cannot be used, in place of raising the first. Where there
                are some, no example has rows: nothing will be trained on.
        Raises:
            UserError: see `Turns.rows`.
        """
        self.forms.update(example.form for _, example in examples if example.form)
        rendered = [self._rendered(example, where, bad) for where, example in examples]
        if bad is not None and bad.errors:
            return [[] for _ in examples]
        split = self._split(rendered)
        if self.data.turns == "auto":
            # With a token over a border inside a conversation, later turns would not see what they do alone.
            apart = [n for n, rows in enumerate(split) if any(not is_clean for _, is_clean in rows)]
            for number in apart:
                where, example = examples[number]
                rendered[number] = self._rendered(example, where, bad, is_apart=True)
            for number, rows in zip(apart, self._split([rendered[n] for n in apart]), strict=True):
                split[number] = rows
        made = []
        for rows, pieces, (_, example) in zip(rendered, split, examples, strict=True):
            if rows:
                self.turns.count(rows)
            encoded = [self._row(row, ids, example) for row, (ids, _) in zip(rows, pieces, strict=True)]
            made.append(encoded or [Encoded(None, NO_LABELS)])
        return made

    def _rendered(
        self, example: Example, where: str, bad: BadRows | None, is_apart: bool = False
    ) -> list[Rendered]:
        if example.is_chat:
            try:
                return self.turns.rows(example, where, is_apart)
            except UserError as error:
                if error.where != where:  # of the recipe or the model
                    raise
                report(error, bad)
                return []
        pieces = [(turn["content"], turn["role"] == "assistant") for turn in example.turns]
        return [Rendered(pieces, len(pieces) - 1)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Special tokens are written by the chat template, or below: added here, they would be doubled.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _row(self, rendered: Rendered, split: list[list[int]], example: Example) -> Encoded:
        """A row and what was done to it, from the ids of its pieces."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = [bos] if self._adds_bos else []
        loss_mask = [False] * len(ids)
        for (_, is_label), own in zip(rendered.pieces, split, strict=True):
            while ids == [bos] and own[:1] == [bos] and self._adds_bos:
                own = own[1:]  # one BOS, whatever the text or the template writes
            # A template may write a line end behind the EOS, which nobody would ever generate.
            num_labels = (len(own) if rendered.is_marked else self._up_to_stop(own)) if is_label else 0
            ids += own
            loss_mask += [True] * num_labels + [False] * (len(own) - num_labels)
        if example.label is None and any(loss_mask):
            num_kept = len(ids) - loss_mask[::-1].index(True)
            del ids[num_kept:], loss_mask[num_kept:]
        ends = {eos} if example.label is not None else {eos, *self.stops}
        if not rendered.is_marked and (not ids or ids[-1] not in ends):
            ids.append(eos)
            loss_mask.append(example.label is None)
        loss_mask[:1] = [False]  # there is no token before it that could predict it
        if example.label is None and not any(loss_mask):
            return Encoded(None, NO_LABELS, rendered.end)
        return Encoded(*self._fit(ids, loss_mask, example.label), rendered.end)

    def _windows(self, pieces: Pieces) -> Iterator[tuple[str, str]]:
        """For each piece what stands before it, and that with the piece.

        Not all that stands before it: a tokenizer cuts every text at its special tokens, so that what is
        before the last one decides nothing, and a conversation takes linear time.
        """
        before = ""
        for text, _ in pieces:
            yield before, before + text
            before += text
            last = 0
            for found in self._special.finditer(before):
                last = found.start()
            before = before[last:]

    def _split(self, rendered: list[list[Rendered]]) -> list[list[tuple[list[list[int]], bool]]]:
        """For each text the ids of its pieces, and whether no token stretches over a border inside it.

        The last border does not count: there a prompt ends at inference, too.
        """
        windows = [[list(self._windows(row.pieces)) for row in rows] for rows in rendered]
        texts = list(dict.fromkeys(t for rows in windows for row in rows for window in row for t in window))
        ids = dict(zip(texts, self._ids(texts) if texts else [], strict=True))
        return [
            [self._cut(row.pieces, own, ids) for row, own in zip(rows, some, strict=True)]
            for rows, some in zip(rendered, windows, strict=True)
        ]

    def _cut(
        self, pieces: Pieces, windows: list[tuple[str, str]], ids: dict[str, list[int]]
    ) -> tuple[list[list[int]], bool]:
        cut, clean = [], []
        for (text, _), (before, upto) in zip(pieces, windows, strict=True):
            # A token that would stretch over the border belongs to neither: then the piece stands alone.
            num_before = len(ids[before])
            clean.append(ids[upto][:num_before] == ids[before])
            cut.append(ids[upto][num_before:] if clean[-1] else self._continued(text))
        last = max((number for number, (_, is_label) in enumerate(pieces) if is_label), default=0)
        return cut, all(clean[:last])

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before a text."""
        line_end, after_it, alone = self._ids(["\n", f"\n{text}", text])
        return after_it[len(line_end) :] if after_it[: len(line_end)] == line_end else alone

    @cached_property
    def _special(self) -> re.Pattern:
        """The tokens that cut a text, wherever they stand in it."""
        tokens = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        cutting = [token.content for token in tokens if not (token.normalized or token.single_word)]
        return re.compile("|".join(map(re.escape, sorted(cutting, key=len, reverse=True))) or "(?!)")

    def _up_to_stop(self, ids: list[int]) -> int:
        """How many of a response's tokens are labels: all up to the first stop that no more text follows."""
        stops, end = self.stops | {self.tokenizer.eos_token_id}, len(ids)
        for number in range(len(ids) - 1, -1, -1):
            if ids[number] in stops:
                end = number + 1
            elif self.tokenizer.decode(ids[number : number + 1]).strip():
                break
        return end

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer usually starts a text with its BOS token."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _fit(self, ids: list[int], loss_mask: list[bool], label: int | None) -> tuple[Row | None, str | None]:
        """The row as it is or cut to max_length, and what was done to it."""
        excess, end = len(ids) - self.data.max_length, self.data.max_length
        if excess <= 0:
            return Row(ids, loss_mask, label=label), None
        if self.data.long_rows == "truncate_response" and any(loss_mask[:end]):
            return Row(ids[:end], loss_mask[:end]), CUT_RESPONSE  # cut, it has no end to learn: no EOS
        num_prompt = len(ids) - 1 if label is not None else loss_mask.index(True)
        if self.data.long_rows == "truncate_prompt" and num_prompt - excess >= MIN_PROMPT:
            # In the middle: a template's start (BOS, whose turn it is) and end stay.
            head = (num_prompt - excess + 1) // 2
            del ids[head : head + excess], loss_mask[head : head + excess]
            return Row(ids, loss_mask, label=label), CUT_PROMPT
        return None, TOO_LONG
