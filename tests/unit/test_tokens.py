"""Token ids of conversations and what of them is learnt, against what transformers gives at inference."""

import copy

import pytest
import tiny

from speft_ds.data.formats import Classes, Example, make_example
from speft_ds.data.tokens import LONG_ROWS, Encoder, load_tokenizer
from speft_ds.errors import UserError
from speft_ds.schema import Data
from unit.tokenizers_small import STYLES, sentencepiece_model, write_llama2_alone

PROMPT, RESPONSE = "what is the answer?", "the quick brown fox, 42 times"
TURNS = [
    ("system", "please say yes"),
    ("user", "what is the question?"),
    ("assistant", "the lazy dog"),
    ("user", "is it red or blue?"),
    ("assistant", "green, hello world"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: style.make(folder / name) for name, style in STYLES.items()}


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture
def tokenizer(style, tokenizers):
    return tokenizers[style.name]


def encode(tokenizer, example, max_length=1000, long_rows="drop"):
    """The row of one example and what was done to it."""
    (encoded,) = Encoder(tokenizer, max_length, long_rows).encode([("here", example)])
    return encoded


def row_of(tokenizer, row, classify=False, **data):
    """The row of one row of a data set."""
    source = Data(path="x.jsonl", **data).sources[0]
    classes = Classes.named(["no", "yes"]) if source.format == "classification" else None
    return encode(tokenizer, make_example(row, "here", source, classes, classify))[0]


def chat(turns, label=None):
    return Example([{"role": role, "content": text} for role, text in turns], True, label)


def plain(prompt, response):
    return Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], False)


def text_of(tokenizer, ids):
    """The ids as text, without the space that SentencePiece puts before every text."""
    bos = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""
    return bos + tokenizer.decode(ids[1:] if bos else ids)


def check(tokenizer, row, pieces):
    """The row is these pieces of text, (text, whether learnt) each; what is learnt ends with the EOS."""
    assert text_of(tokenizer, row.ids) == "".join(text for text, _ in pieces)
    ends, text = [], ""
    for piece, learnt in pieces:
        if learnt:  # as text up to where the span starts and stops: some decoders drop a first space
            ends += [(text, text + piece)]
        text += piece
    spans = [tuple(text_of(tokenizer, row.ids[:edge]) for edge in span) for span in row.spans]
    assert spans == ends
    assert row.ids[-1] == tokenizer.eos_token_id and row.spans[-1][1] == len(row.ids)
    assert row.num_labels == sum(stop - start for start, stop in row.spans) > 0


def check_bos(style, tokenizer, row, count=1):
    if style.bos is None:
        return
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.bos_token_id) == count


def at_inference(tokenizer, turns):
    """Ids of the prompt before an answer, as a user of transformers gets them."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


# Chat templates


@pytest.mark.parametrize(
    ("row", "data", "prompt"),
    [
        ({"prompt": PROMPT, "response": RESPONSE}, {"format": "prompt_completion"}, PROMPT),
        ({"instruction": PROMPT, "input": "", "output": RESPONSE}, {"format": "alpaca"}, PROMPT),
        (
            {"instruction": PROMPT, "input": "red\ngreen", "output": RESPONSE},
            {"format": "alpaca"},
            f"{PROMPT}\n\nred\ngreen",
        ),
        (
            {"messages": [dict(role=r, content=c) for r, c in (("user", PROMPT), ("assistant", RESPONSE))]},
            {"format": "messages"},
            PROMPT,
        ),
    ],
    ids=["prompt_completion", "alpaca", "alpaca_input", "messages"],
)
def test_a_prompt_and_its_response_in_the_chat_template(style, tokenizer, row, data, prompt):
    encoded = row_of(tokenizer, row, **data)
    check(tokenizer, encoded, style.pieces([("user", prompt), ("assistant", RESPONSE)]))
    check_bos(style, tokenizer, encoded)
    inference = at_inference(tokenizer, [("user", prompt)])
    assert encoded.ids[: len(inference)] == inference and encoded.spans == [
        (len(inference), len(encoded.ids))
    ]


def test_every_turn_of_the_assistant_is_learnt_and_no_other(style, tokenizer):
    turns = TURNS if style.has_system else TURNS[1:]
    row, _ = encode(tokenizer, chat(turns))
    check(tokenizer, row, style.pieces(turns))
    check_bos(style, tokenizer, row, count=2 if style.name == "llama2" else 1)  # which has one a question
    first, second = (at_inference(tokenizer, turns[:n]) for n in (len(turns) - 3, len(turns) - 1))
    assert row.ids[: row.spans[0][0]] == first
    assert row.ids[: row.spans[1][0]] == second


def test_what_a_user_says_after_the_last_answer_is_left_out(style, tokenizer):
    turns = [{"role": role, "content": text} for role, text in TURNS[1:]]
    row = row_of(tokenizer, {"messages": [*turns, {"role": "user", "content": "hello?"}]}, format="messages")
    check(tokenizer, row, style.pieces(TURNS[1:]))


def test_a_system_prompt_that_the_template_refuses_is_named(tokenizers):
    with pytest.raises(UserError, match=r"(?s)refuses the row: System role not supported.*here"):
        encode(tokenizers["gemma"], chat(TURNS))


def test_a_template_that_writes_the_past_otherwise_is_refused(tokenizers, monkeypatch):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if not add_generation_prompt %}!{% endif %}"
    )
    monkeypatch.setattr(tokenizers["qwen2"], "chat_template", template)
    with pytest.raises(UserError, match="the response cannot be told from the prompt"):
        encode(tokenizers["qwen2"], chat(TURNS))


def test_a_template_without_a_bos_gets_the_one_that_the_tokenizer_writes(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["llama3"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    row, _ = encode(tokenizer, chat(TURNS))
    check(tokenizer, row, STYLES["llama3"].pieces(TURNS))
    asked = [{"role": role, "content": text} for role, text in TURNS[:2]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert row.ids[: row.spans[0][0]] == tokenizer(prompt)["input_ids"]


def test_a_missing_chat_template_or_eos_is_refused():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"(?s)no chat template.*data.chat_template=false"):
        encode(tokenizer, chat(TURNS))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(tokenizer, 10, "drop")


# Plain text


ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"prompt": f"{PROMPT}\n", "response": RESPONSE}, {"format": "prompt_completion"}),
        ({"prompt": PROMPT, "response": RESPONSE}, {"template": "question: {prompt}\nanswer:\n"}),
        ({"instruction": PROMPT, "input": "", "output": RESPONSE}, {"format": "alpaca"}),
        ({"instruction": PROMPT, "input": "red", "output": RESPONSE}, {"format": "alpaca"}),
    ],
    ids=["prompt_completion", "template", "alpaca", "alpaca_input"],
)
def test_a_prompt_and_its_response_as_plain_text(style, tokenizer, row, data):
    encoded = row_of(tokenizer, row, chat_template=False, **data)
    if data.get("format") == "alpaca":
        task = "Below is an instruction that describes a task. "
        given = ""
        if row["input"]:
            task = (
                "Below is an instruction that describes a task, paired with an input that provides further "
                "context. "
            )
            given = "### Input:\nred\n\n"
        prompt = f"{task}{ALPACA}{PROMPT}\n\n{given}### Response:\n"
    else:
        prompt = f"question: {PROMPT}\nanswer:\n" if "template" in data else row["prompt"]
    pieces = [((style.bos or "") + prompt, False), (f"{RESPONSE}{style.eos}", True)]
    check(tokenizer, encoded, pieces)
    check_bos(style, tokenizer, encoded)
    inference = tokenizer(prompt)["input_ids"]  # here the tokenizer itself writes the BOS
    assert encoded.ids[: len(inference)] == inference


def test_of_a_text_all_is_learnt_but_its_first_token(style, tokenizer):
    row = row_of(tokenizer, {"text": RESPONSE}, format="text")
    assert row.ids == [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]
    assert row.spans == [(1, len(row.ids))]
    check_bos(style, tokenizer, row)


def test_of_an_empty_beginning_nothing_is_learnt_twice(tokenizers):
    row, _ = encode(tokenizers["qwen2"], plain("", "yes"))
    assert row.ids == [*tokenizers["qwen2"]("yes")["input_ids"], tokenizers["qwen2"].eos_token_id]
    assert row.spans == [(1, len(row.ids))]


def test_a_bos_and_an_eos_that_stand_in_the_text_are_not_doubled(style, tokenizer):
    row, _ = encode(tokenizer, plain(f"{style.bos or ''}{PROMPT}\n", f"{RESPONSE}{style.eos}\n"))
    check_bos(style, tokenizer, row)
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{PROMPT}\n{RESPONSE}{style.eos}"


def test_what_stands_behind_an_eos_in_the_text_is_kept(style, tokenizer):
    row, _ = encode(tokenizer, plain(f"{PROMPT}\n", f"yes{style.eos} no"))
    assert tokenizer.decode(row.ids).endswith(f"yes{style.eos} no{style.eos}")


# Where prompt and response touch


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("answer: ", "the fox"),  # " the" is one token
        ("what is th", "e answer"),
        ("question\n", "\nanswer"),
        ("question\n", " the fox"),
        ("12", "34"),
        ("hello \U0001f98a", "\U0001f98a world"),
        ("hello", "\u0301 is an accent"),
    ],
)
def test_the_ids_of_a_prompt_are_those_that_it_has_alone(style, tokenizer, prompt, response):
    row, _ = encode(tokenizer, plain(prompt, response))
    inference = tokenizer(prompt)["input_ids"]
    assert row.ids[: len(inference)] == inference and row.spans == [(len(inference), len(row.ids))]
    assert text_of(tokenizer, row.ids) == f"{style.bos or ''}{prompt}{response}{style.eos}"


def test_many_rows_at_once_are_as_each_alone(tokenizer):
    examples = [("here", plain(f"{PROMPT} {n} ", f"{n} the {RESPONSE}")) for n in range(20)]
    examples += [("here", chat(TURNS[1:])), ("here", chat(TURNS[1:3]))]
    together = Encoder(tokenizer, 1000, "drop").encode(examples)
    assert together == [encode(tokenizer, example) for _, example in examples]


def test_what_no_tokenizer_has_seen_has_ids_in_the_vocabulary(style, tokenizer):
    row, _ = encode(tokenizer, plain("\u4e16\x00\t\U0001f98a", "\u4e16\x00\t\U0001f98a"))
    assert max(row.ids) < len(tokenizer)
    assert text_of(tokenizer, row.ids[row.spans[0][0] :]) == f"\u4e16\x00\t\U0001f98a{style.eos}"


@pytest.mark.parametrize("classifies", [False, True])
def test_what_is_padded_with_is_in_the_vocabulary_and_no_eos_of_a_class(tokenizer, classifies):
    pad = choose_pad_id(tokenizer, classifies)
    assert 0 <= pad < len(tokenizer)
    assert not classifies or pad != tokenizer.eos_token_id


@pytest.mark.parametrize("classifies", [False, True])
def test_a_padding_that_was_added_behind_the_vocabulary_is_not_used(tokenizers, classifies):
    tokenizer = copy.deepcopy(tokenizers["llama2"])
    num_embeddings = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as many a fine-tuned Llama-2 has it
    assert choose_pad_id(tokenizer, classifies) < num_embeddings


def choose_pad_id(tokenizer, classifies):
    from speft_ds.base import Base

    base = Base.__new__(Base)
    base.tokenizer, base.classifies = tokenizer, classifies
    return base._choose_pad_id()


# Classification


@pytest.mark.parametrize("chat_template", [True, False])
def test_the_rows_of_a_classification_end_with_the_eos_and_learn_no_token(style, tokenizer, chat_template):
    data = {"format": "classification", "chat_template": chat_template}
    row = row_of(tokenizer, {"text": PROMPT, "label": "yes"}, classify=True, **data)
    assert (row.label, row.spans, row.num_labels) == (1, [], 1)
    assert row.ids[-1] == tokenizer.eos_token_id and row.ids[-2] != tokenizer.eos_token_id
    check_bos(style, tokenizer, row)
    if not chat_template:
        assert row.ids == [*tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id]


def test_a_language_model_learns_a_class_by_its_name(style, tokenizer):
    row = row_of(tokenizer, {"text": PROMPT, "label": 1}, format="classification")
    check(tokenizer, row, style.pieces([("user", PROMPT), ("assistant", "yes")]))
    assert row.label is None


# Long rows: one token a byte


LONG, SHORT = "abcdefghijklmnopqrstuvwxyz", "0123456789"


@pytest.fixture(scope="module")
def one_a_byte():
    return tiny.make_tokenizer()


def cut(tokenizer, example, max_length, long_rows):
    row, what = encode(tokenizer, example, max_length, long_rows)
    if row is None:
        return None, None, what
    assert len(row.ids) <= max_length
    return tokenizer.decode(row.ids), [tokenizer.decode(row.ids[a:b]) for a, b in row.spans], what


def test_a_row_of_exactly_the_length_stays(one_a_byte):
    whole = (f"{LONG}{SHORT}</s>", [f"{SHORT}</s>"], None)
    for policy in ("drop", "truncate_prompt", "truncate_response"):
        assert cut(one_a_byte, plain(LONG, SHORT), 37, policy) == whole
        assert cut(one_a_byte, plain(LONG, SHORT), 36, policy)[2] in LONG_ROWS


def test_a_long_row_is_left_out(one_a_byte):
    assert encode(one_a_byte, plain(LONG, SHORT), 36, "drop") == (None, "too long, left out")


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(36, "abcdefghijklmopqrstuvwxyz"), (21, "abcdevwxyz"), (20, "abcdewxyz"), (15, "abyz")],
)
def test_a_prompt_is_cut_in_its_middle(one_a_byte, max_length, expected):
    shown = cut(one_a_byte, plain(LONG, SHORT), max_length, "truncate_prompt")
    assert shown == (f"{expected}{SHORT}</s>", [f"{SHORT}</s>"], "truncated prompt")
    assert len(expected) + 11 == max_length


@pytest.mark.parametrize("max_length", [14, 11, 8])
def test_a_response_that_leaves_no_room_for_its_prompt_is_left_out(one_a_byte, max_length):
    shown = encode(one_a_byte, plain(LONG, SHORT), max_length, "truncate_prompt")
    assert shown == (None, "too long, left out")


def test_the_template_around_a_cut_prompt_stays(style, tokenizer):
    whole, _ = encode(tokenizer, chat([("user", " ".join(["hello world"] * 40)), ("assistant", RESPONSE)]))
    room = len(whole.ids) - 30
    row, what = encode(
        tokenizer,
        chat([("user", " ".join(["hello world"] * 40)), ("assistant", RESPONSE)]),
        room,
        "truncate_prompt",
    )
    assert what == "truncated prompt" and len(row.ids) == room
    before = whole.ids[: whole.spans[0][0]]
    kept = row.spans[0][0]
    head = (kept + 1) // 2
    assert row.ids[:kept] == [*before[:head], *before[-(kept - head) :]]
    assert row.ids[kept:] == whole.ids[len(before) :] and row.spans == [(kept, room)]
    check_bos(style, tokenizer, row)


def test_a_cut_prompt_moves_every_later_span(one_a_byte):
    turns = [("user", LONG), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    text, learnt, _ = cut(one_a_byte, chat(turns), 29, "truncate_prompt")
    assert learnt == ["yes</s>", "no</s>"]
    assert text == "<s>abcdefgvwxyz</s><s>yes</s><s>more</s><s>no</s>"


def test_a_response_that_is_cut_learns_no_end(one_a_byte):
    shown = cut(one_a_byte, plain(LONG, SHORT), 30, "truncate_response")
    assert shown == (f"{LONG}0123", ["0123"], "truncated response")
    shown = cut(one_a_byte, plain(LONG, SHORT), 36, "truncate_response")  # only the EOS is too much
    assert shown == (f"{LONG}{SHORT}", [SHORT], "truncated response")
    shown = cut(one_a_byte, plain(LONG, SHORT), 27, "truncate_response")
    assert shown == (f"{LONG}0", ["0"], "truncated response")


def test_a_prompt_that_leaves_no_room_for_its_response_is_left_out(one_a_byte):
    shown = encode(one_a_byte, plain(LONG, SHORT), 26, "truncate_response")
    assert shown == (None, "too long, left out")


def test_turns_beyond_the_cut_are_not_learnt(one_a_byte):
    turns = [("user", "a"), ("assistant", "yes"), ("user", "more"), ("assistant", "no")]
    text, learnt, _ = cut(one_a_byte, chat(turns), 12, "truncate_response")
    assert (text, learnt) == ("<s>a</s><s>yes</s><s>mor", ["yes</s>"])


def test_a_long_text_is_cut_at_its_end_or_left_out(one_a_byte):
    text = Example([{"role": "assistant", "content": LONG}], False)
    assert cut(one_a_byte, text, 10, "truncate_response") == (
        "abcdefghij",
        ["bcdefghij"],
        "truncated response",
    )
    for policy in ("drop", "truncate_prompt"):
        assert encode(one_a_byte, text, 10, policy) == (None, "too long, left out")


def test_a_long_row_to_classify_is_cut_in_its_middle(one_a_byte):
    example = Example([{"role": "user", "content": LONG}], False, label=1)
    row, what = encode(one_a_byte, example, 11, "truncate_prompt")
    assert (one_a_byte.decode(row.ids), row.label, row.spans) == ("abcdevwxyz</s>", 1, [])
    assert what == "truncated prompt"
    for policy in ("drop", "truncate_response"):
        assert encode(one_a_byte, example, 11, policy) == (None, "too long, left out")


# Loading


def test_a_sentencepiece_model_that_stands_alone_encodes_as_sentencepiece(tmp_path):
    import sentencepiece

    tokenizer = load_tokenizer(str(write_llama2_alone(tmp_path / "alone")))
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(adds_space=True))
    texts = [PROMPT, RESPONSE, "two  spaces\n\tand lines\n", "\u4e16\u754c \U0001f98a \xe9 12345", "x", ""]
    for text in texts:
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    row, _ = encode(tokenizer, plain(f"{PROMPT}\n", RESPONSE))
    prompt = [1, *reference.encode(f"{PROMPT}\n")]
    assert row.ids == [1, *reference.encode(f"{PROMPT}\n{RESPONSE}"), 2]
    assert row.ids[: len(prompt)] == prompt and row.spans == [(len(prompt), len(row.ids))]


def test_llama2_of_the_hub_encodes_as_sentencepiece(tokenizers):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(adds_space=True))
    for text in (PROMPT, RESPONSE, "two  spaces\n\tand lines\n", "\u4e16\u754c \U0001f98a 12345"):
        assert tokenizers["llama2"](text)["input_ids"] == [1, *reference.encode(text)]


def test_any_other_tokenizer_is_loaded_as_transformers_does(tmp_path, style, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded(RESPONSE) == tokenizer(RESPONSE) and loaded.chat_template == tokenizer.chat_template


def test_a_tokenizer_without_a_bos_gets_none(tokenizers):
    assert not Encoder(tokenizers["qwen2"], 10, "drop").adds_bos
    assert not Encoder(tokenizers["smollm2"], 10, "drop").adds_bos  # it has one, which it never writes
    assert Encoder(tokenizers["llama3"], 10, "drop").adds_bos
