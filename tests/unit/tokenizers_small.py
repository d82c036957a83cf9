"""Small tokenizers in the styles of well-known models, trained on the spot, and what their templates write.

Each style says by hand how a conversation looks as text; the tests compare with that.
"""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TEXT = (
    "the quick brown fox jumps over a lazy dog while seven wizards say please hello world question answer "
    "what is it user assistant system model paris london red green blue yes no"
)


def make_text(num_lines: int = 300) -> list[str]:
    draw, words = random.Random(0), TEXT.split()
    lines = [" ".join(draw.choice(words) for _ in range(12)) for _ in range(num_lines)]
    return [f"{line.capitalize()}. {number}: {line}?" for number, line in enumerate(lines)]


@cache
def sentencepiece_model(adds_space: bool) -> bytes:
    """A `tokenizer.model` with the settings of Llama-2's (or, without the first space, Gemma's)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=adds_space,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_bpe(adds_space: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of such a model: a piece is made of any two others, earlier pieces first."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(adds_space))
    vocabulary = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    merges = []
    for piece in vocabulary:
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return vocabulary, merges


def byte_level(specials: list[str], pattern: str | None = None):
    """Byte-level BPE as GPT-2, Llama-3 and Qwen2 have it, `specials` behind the trained vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([*make_text(), "\n\n \n: \n. \n"], trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Style:
    """What a tokenizer of one family is like.

    Attributes:
        bos: its BOS where the model has one that the tokenizer adds; `eos`: its EOS.
        has_system: whether its template takes a system prompt.
    """

    name: str
    bos: str | None
    eos: str
    has_system: bool = True

    def make(self, folder: Path):
        """The tokenizer as `AutoTokenizer` loads it from a folder with its files."""
        from transformers import AutoTokenizer

        if not (folder / "tokenizer_config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            globals()[f"_make_{self.name}"]().save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def pieces(self, turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
        """The conversation as text by hand, cut into what is learnt and what is not."""
        return globals()[f"_{self.name}_pieces"](turns)


STYLES = {
    style.name: style
    for style in (
        Style("llama2", "<s>", "</s>"),
        Style("llama3", "<|begin_of_text|>", "<|eot_id|>"),
        Style("gemma", "<bos>", "<eos>", has_system=False),
        Style("qwen2", None, "<|im_end|>"),
        Style("smollm2", None, "<|im_end|>"),
    )
}


# Llama-2: SentencePiece, a BOS before every question, an EOS behind every answer

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
    "'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}"
    "{% set system = '' %}{% endif %}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _make_llama2():
    from transformers import LlamaTokenizer

    vocabulary, merges = sentencepiece_bpe(adds_space=True)
    tokenizer = LlamaTokenizer(vocabulary, merges, add_bos_token=True)
    tokenizer.chat_template = LLAMA2_TEMPLATE
    return tokenizer


def write_llama2_alone(folder: Path) -> Path:
    """The tokenizer.model of Llama-2 without a file that says what to make of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(adds_space=True))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return folder


def _llama2_pieces(turns):
    pieces, system = [], ""
    for role, text in turns:
        if role == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif role == "user":
            pieces.append((f"<s>[INST] {system}{text} [/INST]", False))
            system = ""
        else:
            pieces.append((f" {text} </s>", True))
    return pieces


# Llama-3: the BOS is written by the tokenizer and by the template, too

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def _make_llama3():
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = byte_level(specials, LLAMA3_PATTERN)
    bos = specials[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA3_TEMPLATE
    )


def _llama3_pieces(turns):
    pieces, text = [], "<|begin_of_text|>"
    for role, content in turns:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        if role == "assistant":
            pieces += [(text, False), (f"{content}<|eot_id|>", True)]
            text = ""
        else:
            text += f"{content}<|eot_id|>"
    return pieces


# Gemma: SentencePiece without a first space, roles of its own, turns that end otherwise than the row

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def _make_gemma():
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = sentencepiece_bpe(adds_space=False)
    renamed = {"<s>": "<bos>", "</s>": "<eos>"}
    vocabulary = {renamed.get(piece, piece): number for piece, number in vocabulary.items()}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=GEMMA_TEMPLATE,
    )


def _gemma_pieces(turns):
    pieces, text = [], "<bos>"
    for role, content in turns:
        if role == "assistant":
            pieces += [(f"{text}<start_of_turn>model\n", False), (f"{content}<end_of_turn>\n", True)]
            text = ""
        else:
            text += f"<start_of_turn>{role}\n{content}<end_of_turn>\n"
    pieces[-1] = (f"{pieces[-1][0]}<eos>", True)
    return pieces


# Qwen2: no BOS, a system prompt of its own where the conversation has none. SmolLM2: alike, but it names a
# BOS, which it never adds: <|im_start|>.

CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2_SYSTEM = "You are a helpful assistant."
SMOLLM2_SYSTEM = "You are a helpful AI assistant named small."


def _make_qwen2():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], LLAMA3_PATTERN),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE.replace("SYSTEM", QWEN2_SYSTEM),
    )


def _make_smollm2():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML_TEMPLATE.replace("SYSTEM", SMOLLM2_SYSTEM),
    )


def _qwen2_pieces(turns, system: str = QWEN2_SYSTEM):
    if turns[0][0] != "system":
        turns = [("system", system), *turns]
    pieces, text = [], ""
    for role, content in turns:
        text += f"<|im_start|>{role}\n"
        if role == "assistant":
            pieces += [(text, False), (f"{content}<|im_end|>", True)]
            text = "\n"  # behind the EOS: nobody would ever generate it
        else:
            text += f"{content}<|im_end|>\n"
    return pieces


def _smollm2_pieces(turns):
    return _qwen2_pieces(turns, SMOLLM2_SYSTEM)
