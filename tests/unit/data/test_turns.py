"""Conversations in the styles of current chat templates, against what transformers gives at inference."""

import copy
import datetime
import json
import random

import pytest

from speft_ds.config.data_config import DataConfig
from speft_ds.data.conversations import Example
from speft_ds.data.formats import make_example
from speft_ds.data.tokenize import Encoder, batches, stop_ids
from speft_ds.errors import UserError
from unit.data.chat_templates import CHAT_STYLES
from unit.data.made import refusal
from unit.hostile import changed

CALL = {"id": "call12345", "type": "function", "function": {"name": "sum", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}


def says(role, content, **more):
    return {"role": role, "content": content, **more}


ONE = [says("user", "2+2?"), says("assistant", "4")]
TWO = [*ONE, says("user", "3+3?"), says("assistant", "6")]
LONG = [says(("user", "assistant")[n % 2], f"turn {n}") for n in range(14)]
SYSTEM = [says("system", "be kind"), *TWO]
THINKING = [says("user", "2+2?"), says("assistant", "4", reasoning_content="two and two")]
TALKS = {"one": ONE, "two": TWO, "long": LONG, "system": SYSTEM, "thinking": THINKING}
CALLS = [
    says("user", "2+2?"),
    says("assistant", "", tool_calls=[CALL]),
    says("tool", "4", tool_call_id="call12345"),
    says("assistant", "it is 4"),
]
TOOL_TALKS = {"empty": CALLS, "null": [CALLS[0], says("assistant", None, tool_calls=[CALL]), *CALLS[2:]]}


@pytest.fixture(scope="session")
def styled():
    return {name: style.make() for name, style in CHAT_STYLES.items()}


@pytest.fixture(params=CHAT_STYLES)
def style(request):
    return CHAT_STYLES[request.param]


@pytest.fixture
def tokenizer(styled, style):
    return styled[next(name for name, other in CHAT_STYLES.items() if other is style)]


def example_of(turns, **columns):
    source = DataConfig(path="rows.jsonl", format="messages").sources[0]
    return make_example({"messages": turns, **columns}, "rows.jsonl:3", source, None, False)


def encode(tokenizer, talk, columns=None, stops=frozenset(), **data):
    """The rows of a conversation, and what is said of them."""
    encoder = Encoder(tokenizer, DataConfig(max_length=4000, **data), stops)
    (made,) = encoder.encode([("rows.jsonl:3", example_of(talk, **(columns or {})))])
    return [row for row, _, _ in made], encoder.turns.notes()


def at_inference(tokenizer, turns, **options):
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def labels(tokenizer, row, start):
    """The text of the labels from a place on, up to where the first run of them ends."""
    stop = next((n for n in range(start, len(row.ids)) if not row.loss_mask[n]), len(row.ids))
    return tokenizer.decode(row.ids[start:stop])


def check(style, tokenizer, turns, columns=None):
    """Every turn of the assistant is learnt behind its prompt at inference, and nothing else is."""
    rows, _ = encode(tokenizer, turns, columns)
    numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    learnt, is_one = 0, len(rows) == 1
    if style.parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for number, row in zip(numbers, rows * len(numbers) if is_one else rows, strict=True):
        tools = (columns or {}).get("tools")
        prompt = at_inference(tokenizer, turns[:number], tools=tools, add_generation_prompt=True)
        spoken = at_inference(tokenizer, turns[: number + 1], tools=tools)
        start = len(ids_of(tokenizer, prompt))
        assert row.ids[:start] == ids_of(tokenizer, prompt) and not row.loss_mask[start - 1]
        if spoken.startswith(prompt):
            expected = spoken[len(prompt) :]
        else:
            opened, closing = style.opened
            assert prompt.endswith(opened)
            expected = closing + spoken.removeprefix(prompt.removesuffix(opened)).removeprefix("</think>")
        found = labels(tokenizer, row, start)
        learnt += len(ids_of(tokenizer, found))
        end = style.eos if number == numbers[-1] or not is_one else ""
        assert found in (expected, expected.rstrip(), expected + end)
    assert sum(row.num_labels for row in rows) == learnt
    assert all(row.ids[-1] == tokenizer.eos_token_id and row.loss_mask[-1] for row in rows)


@pytest.mark.parametrize("talk", ["one", "two", "long"])
def test_each_turn_is_learnt_as_at_inference(style, tokenizer, talk):
    check(style, tokenizer, TALKS[talk])
    num_turns = len(TALKS[talk]) // 2
    assert len(encode(tokenizer, TALKS[talk])[0]) == (1 if style.stays else num_turns)


def test_a_system_prompt_is_a_turn_or_stands_in_the_users(style, tokenizer):
    rows, notes = encode(tokenizer, SYSTEM)
    if style.system:
        check(style, tokenizer, SYSTEM)
        assert not any("system" in note for note in notes)
    else:
        merged, _ = encode(tokenizer, [says("user", "be kind\n\n2+2?"), *TWO[1:]])
        assert rows == merged and sum("system" in note for note in notes) == 1


def test_a_thought_is_learnt_where_the_template_has_one(style, tokenizer):
    rows, notes = encode(tokenizer, THINKING)
    text = "".join(part for part, is_label in rows[0].as_text(tokenizer) if is_label)
    unread = [note for note in notes if "'reasoning_content'" in note]
    if style.thought is None:
        assert "two and two" not in text and len(unread) == 1 and "rows.jsonl:3" in unread[0]
    else:
        channel = "<|channel|>final<|message|>" if "channel" in style.thought else ""
        assert not unread
        assert (
            text.removeprefix("<|start|>assistant")
            .replace("<|start|>assistant", "")
            .startswith(f"{style.thought}{channel}4")
        )
        assert ("two and two" in at_inference(tokenizer, THINKING)) or style.opened


@pytest.mark.parametrize("talk", TOOL_TALKS)
@pytest.mark.parametrize("is_text", [False, True])
def test_calls_and_results_of_tools(style, tokenizer, talk, is_text):
    columns = {"tools": json.dumps([TOOL]) if is_text else [TOOL]}
    if not style.tools:
        with refusal("rows.jsonl:3"):
            encode(tokenizer, TOOL_TALKS[talk], columns)
        return
    turns = copy.deepcopy(TOOL_TALKS[talk])
    if is_text:  # as the API of OpenAI sends them
        turns[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
    rows, _ = encode(tokenizer, turns, columns)
    assert rows == encode(tokenizer, CALLS, {"tools": [TOOL]})[0]
    text = "".join(part for row in rows for part, is_label in row.as_text(tokenizer) if is_label)
    assert "sum" in text and "it is 4" in text and "be kind" not in text
    if "deepseek" not in style.eos and style.opened is None:
        check(style, tokenizer, CALLS, {"tools": [TOOL]})


def test_what_a_template_reads_not_is_said_once_by_name(styled):
    turns = [says("user", "a", name="ann"), says("assistant", "b", mood="glad")]
    encoder = Encoder(styled["qwen2.5"], DataConfig())
    encoder.encode([(f"rows.jsonl:{n}", example_of(turns)) for n in range(5)])
    notes = encoder.turns.notes()
    assert len(notes) == 2 and all("5 rows" in note and "rows.jsonl:0" in note for note in notes)
    assert ["'mood'" in note for note in notes] == [True, False]
    reads_name = copy.deepcopy(styled["qwen2.5"])
    reads_name.chat_template = reads_name.chat_template.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    rows, notes = encode(reads_name, turns)
    assert "userann" in reads_name.decode(rows[0].ids) and len(notes) == 1 and "'mood'" in notes[0]


@pytest.mark.parametrize(
    ("prompt", "turn", "written"),
    [
        ("<think>", "</think>", "two and two</think>4"),  # the end of a thought that finished turns leave out
        ("<think>\n", "", "two and two\n</think>\n\n4"),
        ("<think>\n", "<think></think>", "two and two</think>4"),
        ("\n", "", "4"),
    ],
)
def test_a_prompt_that_finished_turns_do_not_begin_with(styled, prompt, turn, written):
    tokenizer = copy.deepcopy(styled["qwen2.5"])
    template = tokenizer.chat_template.replace(
        "assistant\n{{ m.content }}", "assistant\n" + turn + "{{ m.content }}"
    )
    tokenizer.chat_template = template.replace(
        "assistant\n{% endif", "assistant\n{{ '" + prompt + "' }}{% endif"
    )
    for thought, expected in (("two and two", written), ("", written.replace("two and two", ""))):
        talk = [THINKING[0], {**THINKING[1], "reasoning_content": thought}]
        (row,), notes = encode(tokenizer, talk)
        start = ids_of(tokenizer, at_inference(tokenizer, talk[:1], add_generation_prompt=True))
        assert (
            row.ids[: len(start)] == start and labels(tokenizer, row, len(start)) == f"{expected}<|im_end|>"
        )
        assert any("prompt" in note for note in notes)


# data.turns


def test_turns_each_last_and_together(styled):
    stays, goes_on = styled["qwen2.5"], styled["qwen3"]
    for tokenizer in (stays, goes_on):
        each, notes = encode(tokenizer, TWO, turns="each")
        assert len(each) == 2 and any("2 rows" in note for note in notes)
        assert encode(tokenizer, TWO, turns="last")[0] == each[1:]
        assert encode(tokenizer, ONE, turns="together")[0] == each[:1]
    together, notes = encode(stays, TWO, turns="together")
    assert together == encode(stays, TWO)[0] and len(together) == len(notes) == 1
    assert encode(goes_on, TWO)[0] == encode(goes_on, TWO, turns="each")[0]
    with refusal("rows.jsonl:3", "data.turns=auto"):
        encode(goes_on, TWO, turns="together")


def test_the_rows_of_a_conversation_follow_each_other(styled):
    encoder = Encoder(styled["qwen3"], DataConfig())
    examples = [(f"rows.jsonl:{n}", example_of(talk)) for n, talk in enumerate((TWO, ONE, LONG))]
    assert [len(made) for made in encoder.encode(examples)] == [2, 1, 7]
    (note,) = encoder.turns.notes()
    assert "2 conversations" in note and "9 rows" in note
    assert [made.end for made in encoder.encode(examples)[0]] == [1, 3]


def test_a_token_over_a_border_makes_a_row_of_every_turn(styled):
    tokenizer = copy.deepcopy(styled["qwen2.5"])
    # A prompt that ends with a space, which "the" takes in: later turns see it as one token.
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant: ")
    talk = [{**turn, "content": "the answer"} for turn in TWO]
    rows, notes = encode(tokenizer, talk)
    assert len(rows) == 2 and "2 rows" in notes[0]
    assert rows == encode(tokenizer, talk, turns="each")[0]
    prompt = ids_of(tokenizer, at_inference(tokenizer, talk[:3], add_generation_prompt=True))
    assert rows[1].ids[: len(prompt)] == prompt
    (together,), _ = encode(tokenizer, talk, turns="together")
    assert together.ids[: len(prompt)] != prompt
    rows, _ = encode(tokenizer, talk[:2])  # one turn has no later one
    assert len(rows) == 1


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"training": False}])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_a_turn_of_no_weight_is_not_learnt(styled, name, mask):
    (key,) = mask
    turns = [TWO[0], {**TWO[1], **mask}, TWO[2], {**TWO[3], key: type(mask[key])(1)}]
    rows, notes = encode(styled[name], turns)
    assert rows == encode(styled[name], TWO, turns="last")[0] and not notes
    turns = [*TWO[:3], {**TWO[3], **mask}]
    assert encode(styled[name], turns)[0] == encode(styled[name], ONE)[0]
    encoder = Encoder(styled[name], DataConfig())
    ((made,),) = encoder.encode([("here", example_of([TWO[0], {**TWO[1], **mask}]))])
    assert made.row is None and made.change == "nothing to learn, left out"


def test_the_marks_of_a_template_say_what_is_learnt(styled):
    tokenizer = styled["with marks"]
    for turns in (TWO, LONG, SYSTEM):
        (row,), _ = encode(tokenizer, turns)
        reference = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        length = len(row.ids)
        assert row.ids == reference["input_ids"][:length]
        assert row.loss_mask == [bool(is_label) for is_label in reference["assistant_masks"][:length]]
        assert not any(reference["assistant_masks"][length:])
        assert row == encode(styled["qwen2.5"], turns)[0][0]
    fewer = copy.deepcopy(tokenizer)
    fewer.chat_template = tokenizer.chat_template.replace("{% generation %}", "x{% generation %}")
    (row,), _ = encode(fewer, ONE)
    assert fewer.decode(row.ids).endswith("assistant\nx4<|im_end|>") and row.num_labels == 2


# System prompts, options, dates and ends


@pytest.mark.parametrize("name", ["own prompt", "qwen2.5", "gemma"])
def test_a_system_prompt_of_ones_own_or_none(styled, name):
    tokenizer = copy.deepcopy(styled["qwen2.5" if name == "own prompt" else name])
    if name == "own prompt":
        own = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am Qwen<|im_end|>\n{% endif %}"
        tokenizer.chat_template = own + tokenizer.chat_template
    (plain,), _ = encode(tokenizer, ONE)
    assert ("I am Qwen" in tokenizer.decode(plain.ids)) == (name == "own prompt")
    (mine,), _ = encode(tokenizer, ONE, system="be kind")
    assert mine == encode(tokenizer, [says("system", "be kind"), *ONE])[0][0]
    assert encode(tokenizer, SYSTEM, system="be cruel") == encode(tokenizer, SYSTEM)  # a row's own stays
    (none,), _ = encode(tokenizer, ONE, system="")
    expected = encode(tokenizer, [says("system", ""), *ONE])[0][0] if name == "own prompt" else plain
    assert none == expected and "I am Qwen" not in tokenizer.decode(none.ids)


def test_options_reach_the_template_and_unknown_ones_are_refused(styled):
    tokenizer = styled["qwen3"]
    (row,), _ = encode(tokenizer, ONE, chat_template_kwargs={"enable_thinking": False})
    prompt = at_inference(tokenizer, ONE[:1], add_generation_prompt=True, enable_thinking=False)
    assert "</think>" in prompt and labels(tokenizer, row, len(ids_of(tokenizer, prompt))) == "4<|im_end|>"
    with refusal("data.chat_template_kwargs", "enable_thnking"):
        encode(tokenizer, ONE, chat_template_kwargs={"enable_thnking": False})


def test_rows_with_thoughts_ask_for_them_where_prompts_do_not(styled):
    tokenizer = styled["qwen3.5"]
    (row,), notes = encode(tokenizer, THINKING)
    prompt = at_inference(tokenizer, THINKING[:1], add_generation_prompt=True, enable_thinking=True)
    assert row.ids[: len(ids_of(tokenizer, prompt))] == ids_of(tokenizer, prompt)
    assert sum("enable_thinking=true" in note for note in notes) == 1
    with refusal("rows.jsonl:3", "data.chat_template_kwargs"):
        encode(tokenizer, THINKING, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize(("name", "written"), [("llama-3.2", "31 Jan 2026"), ("gpt-oss", "2026-01-31")])
def test_a_template_writes_the_date_that_it_is_given(styled, name, written):
    tokenizer, data = styled[name], DataConfig()
    days = [datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)]
    texts = []
    for day in days:
        ((made,),) = Encoder(tokenizer, data, date=day).encode([("here", example_of(ONE))])
        texts.append(tokenizer.decode(made.row.ids))
    assert written in texts[0] and written not in texts[1]
    today = at_inference(tokenizer, ONE[:1], add_generation_prompt=True)
    ((made,),) = Encoder(tokenizer, data).encode([("here", example_of(ONE))])
    assert tokenizer.decode(made.row.ids).startswith(today)


def test_what_ends_generation_ends_a_turn(styled, tmp_path):
    tokenizer = styled["gemma"]
    end = tokenizer.convert_tokens_to_ids("</turn>")
    assert stop_ids(tokenizer, str(tmp_path)) == {tokenizer.eos_token_id}
    (tmp_path / "config.json").write_text("{}")
    for written in ([tokenizer.eos_token_id, end], end):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert stop_ids(tokenizer, str(tmp_path)) == {tokenizer.eos_token_id, end}
    (row,), _ = encode(tokenizer, TWO, stops=stop_ids(tokenizer, str(tmp_path)))
    assert [part for part, is_label in row.as_text(tokenizer) if is_label] == ["4</turn>", "6</turn>"]
    assert row.ids[-1] == end
    (row,), _ = encode(tokenizer, TWO)  # it does not know better
    assert [part for part, is_label in row.as_text(tokenizer) if is_label] == [
        "4</turn>\n",
        "6</turn>\n<eos>",
    ]


# What cannot be written


def test_a_role_that_the_template_leaves_out_is_refused(styled):
    tokenizer = copy.deepcopy(styled["qwen2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{% else %}", "{% elif m.role == 'user' %}")
    with refusal("rows.jsonl:3", what="'critic'"):
        encode(tokenizer, [says("critic", "bad"), *ONE])
    (row,), notes = encode(tokenizer, SYSTEM)  # a system prompt has another place
    assert "be kind\n\n2+2?" in tokenizer.decode(row.ids) and len(notes) == 2


def test_of_a_call_that_is_not_written_silence_is_not_learnt(styled):
    tokenizer = copy.deepcopy(styled["qwen2.5"])
    template = tokenizer.chat_template
    start = template.index("{% for c in")
    stop = template.index("{% endfor %}", start) + len("{% endfor %}")
    tokenizer.chat_template = template[:start] + template[stop:]
    (row,), notes = encode(tokenizer, CALLS)
    assert [text for text, is_label in row.as_text(tokenizer) if is_label] == ["it is 4<|im_end|>"]
    assert any("'tool_calls'" in note for note in notes)


def test_a_prompt_that_no_answer_follows_is_refused(styled):
    tokenizer = copy.deepcopy(styled["qwen2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "%}<|im_start|>assistant\n{% endif", "%}answer: {% endif"
    )
    with refusal("rows.jsonl:3", "data.chat_template_kwargs"):
        encode(tokenizer, ONE)


# Linear time


class Counted:
    """A tokenizer that counts the characters that it is given, and those that its template writes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read, self.written = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.read += sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def apply_chat_template(self, *arguments, **options):
        texts = self.tokenizer.apply_chat_template(*arguments, **options)
        self.written += sum(map(len, texts))
        return texts


@pytest.mark.parametrize("name", ["qwen2.5", "mistral", "gemma", "llama-3.2", "cohere", "lfm2", "with marks"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_a_conversation_is_tokenised_in_linear_time(styled, name, has_tools):
    has_tools = has_tools and CHAT_STYLES[name].tools
    talk = [says(("user", "assistant")[n % 2], f"turn {n} " + "word " * 20) for n in range(240)]
    per_turn = []
    for num_turns in (60, 240):
        turns = ([says("user", "2+2?"), *CALLS[1:]] if has_tools else []) + talk[:num_turns]
        counted = Counted(styled[name])
        ((made,),) = Encoder(counted, DataConfig(max_length=10**6)).encode([("here", example_of(turns))])
        length = sum(len(text) for text, _ in made.row.as_text(styled[name]))
        per_turn.append((counted.read / length, counted.written / length))
        assert counted.read < 3.5 * length and counted.written < 20 * length
    assert per_turn[1] == pytest.approx(per_turn[0], rel=0.2)


def test_the_windows_of_a_text_give_the_ids_of_its_starts(styled):
    for name in ("qwen2.5", "mistral"):
        (row,), _ = encode(styled[name], LONG)
        numbers = [number for number, turn in enumerate(LONG) if turn["role"] == "assistant"]
        for number in numbers:
            prompt = ids_of(
                styled[name], at_inference(styled[name], LONG[:number], add_generation_prompt=True)
            )
            assert row.ids[: len(prompt)] == prompt


def test_batches_are_bounded_by_their_characters():
    examples = [("here", Example([says("user", "x" * size)], True)) for size in (5, 5, 30, 1, 1, 1)]
    assert [len(batch) for batch in batches(examples, 10)] == [2, 1, 3]
    assert [located for batch in batches(examples, 10) for located in batch] == examples


def test_any_conversation_has_rows_or_is_refused_with_its_place(styled):
    chance, num_refused = random.Random(0), 0
    good = {"messages": [*THINKING, *CALLS], "tools": [TOOL], "documents": [{"text": "a"}]}
    source = DataConfig(path="rows.jsonl", format="messages").sources[0]
    encoders = [Encoder(tokenizer, DataConfig(max_length=4000)) for tokenizer in styled.values()]
    for number in range(400):
        try:
            example = make_example(changed(good, chance), "rows.jsonl:3", source, None, False)
            (rows,) = encoders[number % len(encoders)].encode([("rows.jsonl:3", example)])
            assert rows
        except UserError as error:
            num_refused += 1
            assert error.where == "rows.jsonl:3" and error.fix
    assert 100 < num_refused < 380
