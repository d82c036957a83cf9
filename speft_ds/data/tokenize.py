"""From a conversation to token ids, and which of them are learnt.

The prompt's ids are those that it has when it stands alone, as at inference, so the loss starts exactly at
the response. There is one BOS where the model's tokenizer has the habit of writing one, and the EOS after
the last response is learnt. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from speft_ds import hub
from speft_ds.data.dataset import Row
from speft_ds.data.formats import Example
from speft_ds.errors import UserError

# Of a tokenizer.model, by which a loaded tokenizer is compared with SentencePiece itself.
_PROBE = "Hello  world, 12 \u00e9\n\u4e16 x"
Pieces = list[tuple[str, bool]]  # text, and whether it is learnt
MIN_PROMPT = 4  # tokens that a cut prompt keeps; a row that would have fewer is left out
NOTHING_LEARNT = "nothing to learn, left out"
LONG_ROWS = ("truncated prompt", "truncated response", "too long, left out")


def load_tokenizer(name_or_path: str, where: str = "model.name_or_path") -> object:
    """The tokenizer of a model: a local folder or a hub id.

    Args:
        where: what an error says of where the model is named.
    Raises:
        UserError: transformers cannot load it, or would read a SentencePiece tokenizer.model, which stands
            alone, otherwise than SentencePiece.
    """
    try:
        return _load_tokenizer(name_or_path)
    except UserError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything: KeyError, RuntimeError
        fix = "the model's folder needs its tokenizer's files, as the hub has them"
        raise UserError(f"cannot load the tokenizer: {error}", where, fix) from error


def _load_tokenizer(name_or_path: str) -> object:
    from transformers import AutoTokenizer  # late: it takes seconds

    folder = hub.model_folder(name_or_path)
    names = {path.name for path in folder.iterdir()} if folder else set()
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        return _load_sentencepiece(folder)
    return AutoTokenizer.from_pretrained(name_or_path)


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
    """What turns examples into rows.

    Args:
        tokenizer: of the model.
        max_length: tokens that a row may have.
        long_rows: `data.long_rows` of the recipe.
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
        """Rows, and what had to be done to some: one of LONG_ROWS or NOTHING_LEARNT, or None.

        Where a row is left out, it is None.

        Args:
            examples: where each stands, for errors, and what it is.
        Raises:
            UserError: no chat template, or one that does not separate a prompt from its response.
        """
        pieces = [self.pieces(example, where) for where, example in examples]
        ends = [[sum(len(text) for text, _ in row[: n + 1]) for n in range(len(row))] for row in pieces]
        whole = ["".join(text for text, _ in row) for row in pieces]
        texts = [text[:end] for text, stops in zip(whole, ends, strict=True) for end in stops]
        encoded = iter(self._ids(texts) if texts else [])
        rows = []
        for (_, example), row in zip(examples, pieces, strict=True):
            ids, spans = self._join(row, [next(encoded) for _ in row])
            ids, spans = self._finish(ids, spans, example)
            if not spans and example.label is None:  # a text of one token, which has none before it
                rows.append((None, NOTHING_LEARNT))
            else:
                rows.append(self._fit(ids, spans, example.label))
        return rows

    def pieces(self, example: Example, where: str) -> Pieces:
        """The conversation as one text, cut where the one who speaks changes."""
        if example.is_chat:
            return self._chat_pieces(example, where)
        return [(turn["content"], turn["role"] == "assistant") for turn in example.turns]

    def _chat_pieces(self, example: Example, where: str) -> Pieces:
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
                fix = "one prompt and response a row, or data.chat_template=false with data.template"
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

    def _join(self, pieces: Pieces, encoded: list[list[int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the whole and spans of the learnt pieces, from the ids up to each piece's end."""
        ids, spans = list(encoded[0]), [(0, len(encoded[0]))]
        for (before, upto), (text, _) in zip(pairwise(encoded), pieces[1:], strict=True):
            # A token that would stretch over the border belongs to neither: then the piece stands alone.
            is_clean = upto[: len(before)] == before
            own = upto[len(before) :] if is_clean else self._continued(text)
            spans.append((len(ids), len(ids) + len(own)))
            ids += own
        return ids, [span for span, (_, learnt) in zip(spans, pieces, strict=True) if learnt]

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before a text."""
        line_end, after_it, alone = self._ids(["\n", f"\n{text}", text])
        return after_it[len(line_end) :] if after_it[: len(line_end)] == line_end else alone

    def _finish(
        self, ids: list[int], spans: list[tuple[int, int]], example: Example
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """One BOS at the start; the last learnt span ends with an EOS, behind which nothing stands."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.adds_bos:
            num_bos = next((n for n, token in enumerate(ids) if token != bos), len(ids))
            ids = [bos, *ids[num_bos:]]
            spans = [(max(1, start + 1 - num_bos), stop + 1 - num_bos) for start, stop in spans]
        if example.label is not None:
            return [*ids, *([] if ids[-1:] == [eos] else [eos])], []
        # A template may write a line end behind the EOS, which nobody would ever generate.
        spans = [(start, self._after_last_eos(ids, start, stop)) for start, stop in spans]
        start, stop = spans[-1]
        ids = ids[:stop]
        if not ids or ids[-1] != eos:
            ids, stop = [*ids, eos], stop + 1
        spans[-1] = (start, stop)
        return ids, [(max(1, start), stop) for start, stop in spans if stop > max(1, start)]

    def _after_last_eos(self, ids: list[int], start: int, stop: int) -> int:
        eos = self.tokenizer.eos_token_id
        end = next((n + 1 for n in range(stop - 1, start - 1, -1) if ids[n] == eos), stop)
        return stop if self.tokenizer.decode(ids[end:stop]).strip() else end

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer has the habit of starting a text with its BOS token."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _fit(
        self, ids: list[int], spans: list[tuple[int, int]], label: int | None
    ) -> tuple[Row | None, str | None]:
        """The row as it is or cut to max_length, and what was done to it."""
        excess = len(ids) - self.max_length
        if excess <= 0:
            return Row(ids, spans, label=label), None
        if self.long_rows == "truncate_response" and spans and spans[0][0] < self.max_length:
            # Cut, it has no end to learn: no EOS there.
            spans = [(start, min(stop, self.max_length)) for start, stop in spans if start < self.max_length]
            return Row(ids[: self.max_length], spans), LONG_ROWS[1]
        prompt = len(ids) - 1 if label is not None else spans[0][0]
        if self.long_rows == "truncate_prompt" and prompt - excess >= MIN_PROMPT:
            # In the middle: a template's start (BOS, whose turn it is) and end stay.
            head = (prompt - excess + 1) // 2
            spans = [(start - excess, stop - excess) for start, stop in spans]
            return Row([*ids[:head], *ids[head + excess :]], spans, label=label), LONG_ROWS[0]
        return None, LONG_ROWS[2]
