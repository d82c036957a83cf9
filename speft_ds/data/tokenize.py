"""Tokenisation: from a conversation to token ids, and which of them are label tokens.

The prompt's ids are those that it has when it stands alone, as at inference, so the loss starts exactly at
the response. There is one BOS where the model's tokenizer usually writes one, and the EOS after the last
response is a label token. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from speft_ds import hub
from speft_ds.data.dataset import Row
from speft_ds.data.formats import Example
from speft_ds.errors import UserError

_PROBE = "Hello  world, 12 \u00e9\n\u4e16 x"  # by which a loaded tokenizer is compared with SentencePiece
Pieces = list[tuple[str, bool]]  # text, and whether the loss is on it
MIN_PROMPT = 4  # tokens that a cut prompt keeps; a row that would have fewer is left out
NO_LABELS = "nothing to learn, left out"
CUT_PROMPT, CUT_RESPONSE, TOO_LONG = "truncated prompt", "truncated response", "too long, left out"


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
            return _load_sentencepiece(folder)
        return AutoTokenizer.from_pretrained(name_or_path)
    except UserError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything: KeyError, RuntimeError
        fix = "the model's folder needs its tokenizer's files, as the hub has them"
        raise UserError(f"cannot load the tokenizer: {error}", where, fix) from error


def _load_sentencepiece(folder: Path) -> object:
    """A tokenizer.model without a file that says what to make of it, as Meta gives Llama-2 away.

    AutoTokenizer leaves out the BOS and, for Llama, the space before the text: it would train, but worse.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer, LlamaTokenizer

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = [model.bos_id()] * (model.bos_id() >= 0) + model.encode(_PROBE)
    for kind in (AutoTokenizer, LlamaTokenizer):
        tokenizer = kind.from_pretrained(folder, add_bos_token=True)
        if tokenizer(_PROBE)["input_ids"] == expected:
            return tokenizer
    what = "transformers reads the tokenizer.model, which stands alone, otherwise than SentencePiece does"
    fix = "put tokenizer.json and tokenizer_config.json, as the hub has them, into the model's folder"
    raise UserError(what, str(folder), fix)


@dataclass(frozen=True)
class Encoder:
    """What turns examples into rows; `max_length` and `long_rows` are those of the recipe.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """

    tokenizer: object
    max_length: int
    long_rows: str

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            fix = "set eos_token in the model's tokenizer_config.json"
            raise UserError("the tokenizer has no end-of-sequence token", "model.name_or_path", fix)

    def encode(self, examples: list[tuple[str, Example]]) -> list[tuple[Row | None, str | None]]:
        """For each example its row, None if it is left out, and what was done to it.

        That is NO_LABELS, CUT_PROMPT, CUT_RESPONSE or TOO_LONG; None for a row as it is.

        Args:
            examples: where each stands, for errors, and what it is.
        Raises:
            UserError: no chat template, or one that does not separate a prompt from its response.
        """
        pieces = [self._pieces(example, where) for where, example in examples]
        # Each row up to the end of each of its pieces.
        texts = [text for row in pieces for text in accumulate(text for text, _ in row)]
        encoded = iter(self._ids(texts) if texts else [])
        return [
            self._row(row, [next(encoded) for _ in row], example)
            for row, (_, example) in zip(pieces, examples, strict=True)
        ]

    def _pieces(self, example: Example, where: str) -> Pieces:
        """The conversation as one text, cut where the speaker changes."""
        if not example.is_chat:
            return [(turn["content"], turn["role"] == "assistant") for turn in example.turns]
        if not self.tokenizer.chat_template:
            fix = "data.chat_template=false"
            raise UserError("the tokenizer has no chat template", "data.chat_template", fix)
        if example.label is not None:
            return [(self._render(example.turns, where, prompt=False), False)]
        pieces, text = [], ""
        for number, turn in enumerate(example.turns):
            if turn["role"] != "assistant":
                continue
            prompt = self._render(example.turns[:number], where, prompt=True)
            spoken = self._render(example.turns[: number + 1], where, prompt=False)
            if not prompt.startswith(text) or not spoken.startswith(prompt):
                what = "the chat template writes a conversation's start otherwise once it goes on"
                fix = "one prompt and response per row, or data.chat_template=false with data.template"
                raise UserError(f"{what}: the response cannot be told from the prompt", where, fix)
            pieces += [(prompt[len(text) :], False), (spoken[len(prompt) :], True)]
            text = spoken
        return pieces

    def _render(self, turns: list[dict], where: str, prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
        except Exception as error:  # a template is a program that may raise what it likes
            fix = "change the row, or data.chat_template=false"
            raise UserError(f"the tokenizer's chat template refuses the row: {error}", where, fix) from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Special tokens are written by the chat template, or below: added here, they would be doubled.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _row(
        self, pieces: Pieces, encoded: list[list[int]], example: Example
    ) -> tuple[Row | None, str | None]:
        """A row and what was done to it, from the ids up to the end of each of its pieces."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = [bos] if self._adds_bos else []
        loss_mask = [False] * len(ids)
        for (_, is_label), own in zip(pieces, self._split(pieces, encoded), strict=True):
            while ids == [bos] and own[:1] == [bos] and self._adds_bos:
                own = own[1:]  # one BOS, whatever the text or the template writes
            # A template may write a line end behind the EOS, which nobody would ever generate.
            num_labels = self._up_to_last_eos(own) if is_label else 0
            ids += own
            loss_mask += [True] * num_labels + [False] * (len(own) - num_labels)
            num_behind = len(own) - num_labels
        if example.label is None:
            end = len(ids) - num_behind
            del ids[end:], loss_mask[end:]
        if ids[-1:] != [eos]:
            ids.append(eos)
            loss_mask.append(example.label is None)
        loss_mask[0] = False  # there is no token before it that could predict it
        if example.label is None and not any(loss_mask):
            return None, NO_LABELS
        return self._fit(ids, loss_mask, example.label)

    def _split(self, pieces: Pieces, encoded: list[list[int]]) -> list[list[int]]:
        """The ids of each piece."""
        split, before = [], []
        for number, upto in enumerate(encoded):
            # A token that would stretch over the border belongs to neither: then the piece stands alone.
            is_clean = upto[: len(before)] == before
            split.append(upto[len(before) :] if is_clean else self._continued(pieces[number][0]))
            before = upto
        return split

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before a text."""
        line_end, after_it, alone = self._ids(["\n", f"\n{text}", text])
        return after_it[len(line_end) :] if after_it[: len(line_end)] == line_end else alone

    def _up_to_last_eos(self, ids: list[int]) -> int:
        """How many of a response's tokens are labels: all, but for white space behind its last EOS."""
        eos = self.tokenizer.eos_token_id
        end = next((n for n in range(len(ids), 0, -1) if ids[n - 1] == eos), len(ids))
        return len(ids) if self.tokenizer.decode(ids[end:]).strip() else end

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer usually starts a text with its BOS token."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _fit(self, ids: list[int], loss_mask: list[bool], label: int | None) -> tuple[Row | None, str | None]:
        """The row as it is or cut to max_length, and what was done to it."""
        excess, end = len(ids) - self.max_length, self.max_length
        if excess <= 0:
            return Row(ids, loss_mask, label=label), None
        if self.long_rows == "truncate_response" and any(loss_mask[:end]):
            return Row(ids[:end], loss_mask[:end]), CUT_RESPONSE  # cut, it has no end to learn: no EOS
        num_prompt = len(ids) - 1 if label is not None else loss_mask.index(True)
        if self.long_rows == "truncate_prompt" and num_prompt - excess >= MIN_PROMPT:
            # In the middle: a template's start (BOS, whose turn it is) and end stay.
            head = (num_prompt - excess + 1) // 2
            del ids[head : head + excess], loss_mask[head : head + excess]
            return Row(ids, loss_mask, label=label), CUT_PROMPT
        return None, TOO_LONG
