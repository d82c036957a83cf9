"""Rows in five styles of tokenizers, against what transformers gives at inference."""

import copy

import pytest
import sentencepiece
import tiny

from speft_ds.config.data_config import DataConfig
from speft_ds.data.tokenize import CUT_PROMPT, CUT_RESPONSE, TOO_LONG, Encoder, load_tokenizer
from speft_ds.training.run_data import choose_pad_id
from unit.data.made import chat, encode, plain, refusal, responses
from unit.data.tokenizers_small import sentencepiece_model, write_llama2_alone

PROMPT, RESPONSE = "what is the answer?", "the quick brown fox, 42 times"
TURNS = [
    ("system", "please say yes"),
    ("user", "what is the question?"),
    ("assistant", "the lazy dog"),
    ("user", "is it red or blue?"),
    ("assistant", "green, hello world"),
]
TEXTS = [PROMPT, RESPONSE, "two  spaces\n\tand lines\n", "\u4e16\u754c \U0001f98a \xe9 12345", "x", ""]


def text_of(tokenizer, ids):
    """The ids as text, without the space that SentencePiece puts before every text."""
    bos = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""
    return bos + tokenizer.decode(ids[1:] if bos else ids)


def check_bos(style, tokenizer, row, count=1):
    if style.bos is not None:
        assert row.ids[0] == tokenizer.bos_token_id and row.ids.count(tokenizer.bos_token_id) == count


def at_inference(tokenizer, turns):
    """Ids of the prompt before an answer, as a user of transformers gets them."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


# In the tokenizer's chat template


@pytest.mark.parametrize("turns", [[("user", f"{PROMPT}\n\nred"), ("assistant", RESPONSE)], TURNS])
def test_the_loss_is_on_every_turn_of_the_assistant_and_on_no_other(style, tokenizer, turns):
    turns = turns if style.has_system else [turn for turn in turns if turn[0] != "system"]
    row, _ = encode(tokenizer, chat(turns))
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    for (start, stop), number in zip(responses(row), answers, strict=True):
        assert row.ids[:start] == at_inference(tokenizer, turns[:number])
        answer = style.answer.format(turns[number][1])
        if number == answers[-1]:
            answer = answer.removesuffix(style.eos) + style.eos
        assert text_of(tokenizer, row.ids[:stop]) == text_of(tokenizer, row.ids[:start]) + answer
    assert stop == len(row.ids) == len(row.loss_mask) and row.ids[-1] == tokenizer.eos_token_id
    check_bos(style, tokenizer, row, len(answers) if style.name == "llama2" else 1)  # one per question


def test_what_a_chat_template_cannot_write_is_named(tokenizers, monkeypatch):
    other = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    refuses = "{{ raise_exception('no') }}"
    for template, where in ((other, "here"), (refuses, "here"), (None, "data.chat_template")):
        monkeypatch.setattr(tokenizers["qwen2"], "chat_template", template)
        with refusal(where, "data.chat_template"):
            encode(tokenizers["qwen2"], chat(TURNS[-2:]))


def test_a_template_without_a_bos_gets_the_one_that_the_tokenizer_writes(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["llama3"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    assert encode(tokenizer, chat(TURNS)) == encode(tokenizers["llama3"], chat(TURNS))


# Plain text


def test_of_a_text_all_tokens_are_labels_but_the_first(style, tokenizer):
    row, _ = encode(tokenizer, chat([("assistant", RESPONSE)], is_chat=False))
    assert encode(tokenizer, plain("", RESPONSE)) == (row, None)
    assert row.ids == [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]
    assert responses(row) == [(1, len(row.ids))]
    check_bos(style, tokenizer, row)


def test_a_bos_and_an_eos_that_stand_in_the_text_are_not_doubled(style, tokenizer):
    row, _ = encode(tokenizer, plain(f"{style.bos or ''}{PROMPT}\n", f"{RESPONSE}{style.eos}\n"))
    check_bos(style, tokenizer, row)
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{PROMPT}\n{RESPONSE}{style.eos}"
    row, _ = encode(tokenizer, plain(f"{PROMPT}\n", f"yes{style.eos} no"))  # behind the EOS is a text
    assert tokenizer.decode(row.ids).endswith(f"yes{style.eos} no{style.eos}")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (f"{PROMPT}\n", RESPONSE),
        ("answer: ", "the fox"),  # " the" is one token
        ("what is th", "e answer"),
        ("question\n", "\nanswer"),
        ("question\n", " the fox"),
        ("12", "34"),
        ("hello \U0001f98a", "\U0001f98a world"),
        ("hello", "\u0301 is an accent"),
        ("\u4e16\x00\t\U0001f98a", "\u4e16\x00\t\U0001f98a"),  # no tokenizer has seen it
    ],
)
def test_the_ids_of_a_prompt_are_those_that_it_has_alone(style, tokenizer, prompt, response):
    row, _ = encode(tokenizer, plain(prompt, response))
    inference = tokenizer(prompt)["input_ids"]  # here the tokenizer itself writes the BOS
    assert row.ids[: len(inference)] == inference and responses(row) == [(len(inference), len(row.ids))]
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{prompt}{response}{style.eos}"
    assert max(row.ids) < len(tokenizer) and row.num_labels == len(row.ids) - len(inference)
    check_bos(style, tokenizer, row)


def test_many_rows_at_once_are_as_each_alone(tokenizer):
    examples = [("here", plain(f"{PROMPT} {n} ", f"{n} the {RESPONSE}")) for n in range(20)]
    examples += [("here", chat(TURNS[1:])), ("here", chat(TURNS[1:3]))]
    together = Encoder(tokenizer, DataConfig()).encode(examples)
    assert [made[:2] for (made,) in together] == [encode(tokenizer, example) for _, example in examples]


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_row_to_classify_ends_with_the_eos_and_has_no_label_tokens(style, tokenizer, is_chat):
    row, _ = encode(tokenizer, chat([("user", PROMPT)], is_chat, label=1))
    assert (row.label, any(row.loss_mask), row.num_labels) == (1, False, 1)
    assert row.ids[-1] == tokenizer.eos_token_id and row.ids[-2] != tokenizer.eos_token_id
    check_bos(style, tokenizer, row)
    if not is_chat:
        assert row.ids == [*tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id]


# Rows that are too long


LONG_ROWS = ("drop", "truncate_prompt", "truncate_response")
BYTES = tiny.make_tokenizer()  # one token per byte, and one for the end
LONG, SHORT = "abcdefghijklmnopqrstuvwxyz", "0123456789"
END, PAIR = f"{SHORT}</s>", plain(LONG, SHORT)
TEXT = chat([("assistant", LONG)], is_chat=False)
TO_CLASSIFY = chat([("user", LONG)], is_chat=False, label=1)
ANSWERED = [("assistant", "yes"), ("user", "more"), ("assistant", "no")]
TALK, SHORT_TALK = (chat([("user", text), *ANSWERED]) for text in (LONG, "a"))


@pytest.mark.parametrize(
    ("example", "max_length", "long_rows", "text", "labels", "what"),
    [
        (PAIR, 36, "truncate_prompt", f"abcdefghijklmopqrstuvwxyz{END}", [END], CUT_PROMPT),
        (PAIR, 21, "truncate_prompt", f"abcdevwxyz{END}", [END], CUT_PROMPT),
        (PAIR, 20, "truncate_prompt", f"abcdewxyz{END}", [END], CUT_PROMPT),
        (PAIR, 15, "truncate_prompt", f"abyz{END}", [END], CUT_PROMPT),
        (TO_CLASSIFY, 11, "truncate_prompt", "abcdevwxyz</s>", [], CUT_PROMPT),
        (
            TALK,
            29,
            "truncate_prompt",
            "<s>abcdefgvwxyz</s><s>yes</s><s>more</s><s>no</s>",
            ["yes</s>", "no</s>"],
            CUT_PROMPT,
        ),
        (PAIR, 36, "truncate_response", f"{LONG}{SHORT}", [SHORT], CUT_RESPONSE),  # a cut one has no EOS
        (PAIR, 30, "truncate_response", f"{LONG}0123", ["0123"], CUT_RESPONSE),
        (PAIR, 27, "truncate_response", f"{LONG}0", ["0"], CUT_RESPONSE),
        (TEXT, 10, "truncate_response", "abcdefghij", ["bcdefghij"], CUT_RESPONSE),
        (SHORT_TALK, 12, "truncate_response", "<s>a</s><s>yes</s><s>mor", ["yes</s>"], CUT_RESPONSE),
        *((PAIR, 37, policy, f"{LONG}{END}", [END], None) for policy in LONG_ROWS),
    ],
)
def test_a_row_that_is_too_long_is_cut(example, max_length, long_rows, text, labels, what):
    row, done = encode(BYTES, example, max_length, long_rows)
    assert done == what and row.label == example.label and len(row.ids) <= max_length
    assert BYTES.decode(row.ids) == text
    assert [BYTES.decode(row.ids[start:stop]) for start, stop in responses(row)] == labels


@pytest.mark.parametrize(
    ("example", "max_length", "long_rows"),
    [
        (PAIR, 36, "drop"),
        (PAIR, 14, "truncate_prompt"),  # the response leaves no room for the prompt
        (PAIR, 8, "truncate_prompt"),
        (PAIR, 26, "truncate_response"),  # the prompt leaves no room for the response
        (TEXT, 10, "drop"),
        (TEXT, 10, "truncate_prompt"),
        (TO_CLASSIFY, 11, "drop"),
        (TO_CLASSIFY, 11, "truncate_response"),
    ],
)
def test_a_row_that_cannot_be_cut_is_left_out(example, max_length, long_rows):
    assert encode(BYTES, example, max_length, long_rows) == (None, TOO_LONG)


def test_the_template_around_a_cut_prompt_stays(style, tokenizer):
    example = chat([("user", " ".join(["hello world"] * 40)), ("assistant", "the quick brown fox")])
    complete, _ = encode(tokenizer, example)
    room, start = len(complete.ids) - 30, responses(complete)[0][0]
    row, what = encode(tokenizer, example, room, "truncate_prompt")
    head = (start - 30 + 1) // 2
    assert what == CUT_PROMPT and responses(row) == [(start - 30, room)]
    assert row.ids == complete.ids[:head] + complete.ids[head + 30 :]
    check_bos(style, tokenizer, row)


# Tokenizers as they are loaded


def test_llama2_encodes_as_sentencepiece_alone_and_from_the_hub(tmp_path, tokenizers):
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    alone = load_tokenizer(str(write_llama2_alone(tmp_path / "alone")))
    for text in TEXTS:
        ids = [1, *reference.encode(text)]
        assert alone(text)["input_ids"] == tokenizers["llama2"](text)["input_ids"] == ids
        assert alone.decode(ids, skip_special_tokens=True) == text
    row, _ = encode(alone, plain(f"{PROMPT}\n", RESPONSE))
    prompt = [1, *reference.encode(f"{PROMPT}\n")]
    assert row.ids == [1, *reference.encode(f"{PROMPT}\n{RESPONSE}"), 2]
    assert row.ids[: len(prompt)] == prompt and responses(row) == [(len(prompt), len(row.ids))]


def test_any_other_tokenizer_is_loaded_as_transformers_does(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded(RESPONSE) == tokenizer(RESPONSE) and loaded.chat_template == tokenizer.chat_template


def test_a_tokenizer_without_an_eos_is_refused():
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    with refusal("model.name_or_path", "eos_token"):
        Encoder(tokenizer, DataConfig())


# Padding


@pytest.mark.parametrize("classifies", [False, True])
def test_what_is_padded_with_is_in_the_vocabulary_and_no_eos_of_a_class(tokenizers, tokenizer, classifies):
    pad = choose_pad_id(tokenizer, classifies)
    assert 0 <= pad < len(tokenizer)
    assert not classifies or pad != tokenizer.eos_token_id
    added = copy.deepcopy(tokenizers["llama2"])
    num_embeddings = len(added)
    added.add_special_tokens({"pad_token": "[PAD]"})  # behind the vocabulary, as many a fine-tuned one has
    assert choose_pad_id(added, classifies) < num_embeddings
