"""Small tokenizers in the styles of well-known models, trained on the spot."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

TEXT = (
    "the quick brown fox jumps over a lazy dog while seven wizards say please hello world question answer "
    "what is it user assistant system model paris london red green blue yes no"
)


def make_text() -> list[str]:
    draw, words = random.Random(0), TEXT.split()
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(300)]
    return [f"{line.capitalize()}. {number}: {line}?" for number, line in enumerate(lines)]


@cache
def sentencepiece_model() -> bytes:
    """A `tokenizer.model` with the settings of Llama-2's."""
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
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_llama2_alone(folder: Path) -> Path:
    """The tokenizer.model of Llama-2 without a file that says what to make of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


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


# Llama-2: SentencePiece, a BOS before every question, an EOS behind every answer


def _make_llama2():
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = LlamaTokenizer.from_pretrained(write_llama2_alone(Path(folder)), add_bos_token=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
        "'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}"
        "{% set system = '' %}{% endif %}{% for message in rest %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + "
        "' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def _adding_bos(bos: str, specials: list[str], template: str, **options):
    """A byte-level tokenizer that writes a BOS, as its template does, too."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level([bos, *specials], LLAMA3_PATTERN)
    writes_bos = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), writes_bos])
    options |= {"bos_token": bos, "chat_template": "{{ bos_token }}" + template}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


# Llama-3


def _make_llama3():
    template = (
        "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )
    specials = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return _adding_bos("<|begin_of_text|>", specials, template, eos_token="<|eot_id|>")


# Gemma: no system prompt, roles of its own, turns that end otherwise than the row


def _make_gemma():
    template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ '<start_of_turn>' + "
        "('model' if message['role'] == 'assistant' else message['role']) + '\\n' + "
        "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )
    specials = ["<pad>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return _adding_bos("<bos>", specials, template, eos_token="<eos>", pad_token="<pad>")


# Qwen2: no BOS, a system prompt of its own where the conversation has none. SmolLM2: alike, but it names a
# BOS, which it never adds: <|im_start|>.

SYSTEM = "You are a helpful assistant."


def _make_chatml(pattern: str | None, **special):
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}{{% endif %}}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pattern),
        eos_token="<|im_end|>",
        chat_template=template,
        **special,
    )


_make_qwen2 = partial(_make_chatml, LLAMA3_PATTERN, pad_token="<|endoftext|>")
_make_smollm2 = partial(_make_chatml, None, bos_token="<|im_start|>", pad_token="<|im_end|>")


@dataclass(frozen=True)
class Style:
    """What a tokenizer of one family is like.

    Attributes:
        bos: its BOS where the model has one that the tokenizer adds; `eos`: its EOS.
        answer: what the chat template makes of a response, up to where its turn ends.
        has_system: whether its template takes a system prompt.
    """

    name: str
    bos: str | None
    eos: str
    answer: str
    make_tokenizer: Callable
    has_system: bool = True

    def make(self, folder: Path):
        """The tokenizer as `AutoTokenizer` loads it from a folder with its files."""
        from transformers import AutoTokenizer

        self.make_tokenizer().save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


STYLES = {
    style.name: style
    for style in (
        Style("llama2", "<s>", "</s>", " {} </s>", _make_llama2),
        Style("llama3", "<|begin_of_text|>", "<|eot_id|>", "{}<|eot_id|>", _make_llama3),
        Style("gemma", "<bos>", "<eos>", "{}<end_of_turn>\n", _make_gemma, has_system=False),
        Style("qwen2", None, "<|im_end|>", "{}<|im_end|>", _make_qwen2),
        Style("smollm2", None, "<|im_end|>", "{}<|im_end|>", _make_smollm2),
    )
}
