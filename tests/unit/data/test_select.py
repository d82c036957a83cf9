"""Which rows are selected; IFD scores against a reference without batches, padding and cut logits."""

import json
import math
import os
import random
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import tiny as tiny_model
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speft_ds.config.data_config import DataConfig, Source
from speft_ds.data import select
from speft_ds.data.dataset import Row
from speft_ds.data.select import hardest, ifd_scores
from unit.data.made import make, pairs, refusal, shown, without_chat, write
from unit.data.test_sampler import randperm


def test_the_longest_responses_are_taken_in_the_order_of_the_file(tmp_path, model):
    rows = [*pairs("aa", "b", "cccc", "dd", "ee"), *pairs("f", prompt="p" * 50)]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = make(without_chat(path, select="longest", select_rows=3), model)
    assert shown(dataset) == ["p|aa</s>", "p|cccc</s>", "p|dd</s>"]  # of equal ones the first
    assert dataset.facts["sources"][0]["not selected"] == 3
    assert len(make(without_chat(path, select="longest", select_rows=6), model)) == 6
    with refusal("data.select_rows", "data.select_rows=6"):
        make(without_chat(path, select="longest", select_rows=7), model)


def test_random_rows_depend_on_the_seed_alone(path, model):
    data, rows = DataConfig(path=str(path), select="random", select_rows=7), tiny_model.read_rows(path)
    for seed in (0, 1):
        expected = sorted(randperm(30, seed, "select", 0)[:7])
        assert list(make(data, model, seed=seed)) == [rows[n] for n in expected]


def test_the_selection_is_over_all_sources_together(tmp_path, model):
    texts = [("aaa", "b"), ("cc", "d")]
    paths = [write(tmp_path / f"{n}.jsonl", pairs(*some)) for n, some in enumerate(texts)]
    mixture = [Source(path=str(path)) for path in paths]
    data = DataConfig(mixture=mixture, chat_template=False, select="longest", select_rows=2, packing=True)
    dataset = make(data, model)
    assert shown(dataset.rows()) == ["p|aaa</s>", "p|cc</s>"]
    assert dataset.row_sizes == (1, 1) and dataset.sizes == (1, 1)
    with refusal("data.path", "data.select_rows", what="2 not selected"):
        make(data.model_copy(update={"select_rows": 1}), model)


def test_ifd_chooses_by_prompt_and_response(tmp_path, model, monkeypatch):
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    turns = [{"role": role, "content": text} for role, text in talk]
    path = write(tmp_path / "rows.jsonl", [{"messages": some} for some in (turns, turns[1:3], turns[3:])])
    seen = []

    def scores(texts, scorer):
        seen.append((texts, scorer))
        return [0.5, 2.0, 0.9]

    monkeypatch.setattr("speft_ds.data.select.ifd_scores", scores)
    data = DataConfig(path=str(path), format="messages", select="ifd", select_rows=1, scorer=str(model))
    dataset = make(data, model)
    assert seen == [([("s\na\nb\nc\n", "d"), ("a\n", "b"), ("c\n", "d")], str(model))]
    assert shown(dataset) == ["<s>c</s><s>|d</s>"] and dataset.facts["sources"][0]["not selected"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_a_naive_sort(seed):
    draw = random.Random(seed)
    scores = [draw.choice([0.1, 0.5, 0.5, 0.9, draw.uniform(0, 2), 1.0, 1.5]) for _ in range(30)]
    # Rows of 1 or more do not follow from their prompt.
    ranked = sorted((-score, number) for number, score in enumerate(scores) if score < 1)
    for k in range(32):
        assert hardest(scores, k) == {number for _, number in ranked[:k]}


# Scores


WEIGHTS = "model.safetensors"
PAIRS = [
    ("say cat ", "cat 1"),
    ("", "a response without any prompt"),
    ("x", "y"),
    ("please " * 20, "e"),
    ("a", "long " * 30),
    ("h\u00e9llo w\u00f6rld ", "\u00fcn\u00efcode \u2713 done"),
    ("say eel please ", "eel 4, and then a few words more"),
    ("<s>a prompt that brings its own first token ", "fox 2"),
]


@pytest.fixture
def scorer(tiny, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny["untied"], tmp_path / "scorer"))


@pytest.fixture
def loads(monkeypatch):
    """Counts the models that are loaded."""
    load = mock.Mock(wraps=AutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return load


def add_to_weight(file, name, row, value):
    """Adds to a row, or to one number, of a weight in a file."""
    weights = load_file(file)
    weights[name][row] += value
    save_file(weights, file, {"format": "pt"})


def mean_loss(model, ids, num_labels):
    """Of the last `num_labels` tokens of one row: every logit, nothing padded."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[-num_labels:].mean()


@torch.no_grad()
def reference(folder, id_pairs, first=256):
    """IFD of each (prompt ids, response ids)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for prompt, response in id_pairs:
        with_prompt = mean_loss(model, [first, *prompt, *response], len(response))
        alone = mean_loss(model, [first, *response], len(response))
        scores.append(float(with_prompt.exp() / alone.exp()))
    return pytest.approx(scores, rel=1e-5)


def token_ids(folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]


def test_scores_equal_the_reference(tiny):
    ids = token_ids(tiny["untied"], PAIRS)
    assert ids[-1][0][0] == 256  # this prompt's own BOS is not doubled
    ids[-1] = (ids[-1][0][1:], ids[-1][1])
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert scores == reference(tiny["untied"], ids)
    assert scores[1] == 1.0  # no prompt, no help
    assert len({round(score, 4) for score in scores}) == len(PAIRS)
    assert ifd_scores([], tiny["untied"]) == []


def test_neither_other_rows_of_a_batch_nor_kept_logits_matter(tiny, monkeypatch):
    monkeypatch.setattr(select, "_read_cache", lambda path: None)
    expected = pytest.approx(ifd_scores(PAIRS, str(tiny["untied"])), rel=1e-5)
    assert ifd_scores(PAIRS[::-1], tiny["untied"])[::-1] == expected
    monkeypatch.setitem(select.BATCH_TOKENS, "cpu", 1)  # row by row
    assert ifd_scores(PAIRS, tiny["untied"]) == expected
    original = LlamaForCausalLM.forward

    def forward(self, input_ids, use_cache):  # without logits_to_keep
        return original(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert ifd_scores(PAIRS, tiny["untied"]) == expected


def test_batches_are_longest_first_and_bounded():
    rows = [Row([0] * length, [False] * length) for length in (3, 9, 4, 2, 9, 50)]
    assert list(select._batches(rows, 20)) == [[5], [1, 4], [2, 0, 3]]


def test_long_texts_are_cut_to_the_context_or_the_limit(tiny, monkeypatch):
    prompt, response = "".join(map(chr, range(33, 113))) * 8, "the quick brown fox " * 30
    rows = [(prompt, "short ones"), ("short", response), (prompt, response)]
    (p, short_r), (short_p, r), _ = token_ids(tiny["untied"], rows)
    # 256 tokens, one of them BOS: the prompt loses its middle, the response its end.
    ids = [(p[:123] + p[-122:], short_r), (short_p, r[:250]), (p[:64] + p[-64:], r[:127])]
    assert all(len(prompt_ids) + len(response_ids) == 255 for prompt_ids, response_ids in ids)
    assert ifd_scores(rows, tiny["untied"]) == reference(tiny["untied"], ids)
    monkeypatch.setattr(select, "MAX_TOKENS", 32)
    expected = reference(tiny["untied"], [(short_p, r[:26])])
    assert ifd_scores([("short", response)], tiny["untied"]) == expected


def test_without_bos_the_first_token_is_eos(scorer):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(scorer)
    assert ifd_scores(PAIRS[:4], scorer) == reference(scorer, token_ids(scorer, PAIRS[:4]), first=257)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(scorer)
    with refusal("data.scorer"):
        ifd_scores(PAIRS, scorer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_response_or_a_finite_loss_is_named(scorer, value):
    z = AutoTokenizer.from_pretrained(scorer)("z")["input_ids"][0]
    add_to_weight(scorer / WEIGHTS, "model.embed_tokens.weight", z, value)
    assert len(ifd_scores(PAIRS, scorer)) == len(PAIRS)  # padding and other rows are not touched
    with refusal("data.scorer", what="row 2"):
        ifd_scores([("say a", "a b c d e f"), ("say z", "ok"), ("x", "y")], scorer)
    with refusal("data.scorer", what="row 2"):
        ifd_scores([("a", "b"), ("a", "")], scorer)


def test_a_ratio_beyond_float_is_limited(tiny, monkeypatch):
    losses = iter([[2000.0, 0.0], [1.0, 2000.0]])
    monkeypatch.setattr(select, "_mean_losses", lambda *_: next(losses))
    scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert scores[0] > 1e300 and scores[1] == 0.0
    assert ifd_scores(PAIRS[:2], tiny["untied"]) == scores  # and comes back from the cache


# The scorer


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGES = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "cut weights": lambda folder: os.truncate(folder / WEIGHTS, 30_000),
    "bad config": lambda folder: (folder / "config.json").write_text("{"),
    "a layer missing": lambda folder: edit(folder / "config.json", num_hidden_layers=3),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_scorer_that_cannot_be_loaded(scorer, damage):
    DAMAGES[damage](scorer)
    with refusal("data.scorer", what=str(scorer)):
        ifd_scores(PAIRS, scorer)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_of_the_hub_is_downloaded(tiny, scorer, monkeypatch, pickled):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(scorer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if pickled:
        torch.save(load_file(scorer / WEIGHTS), scorer / "pytorch_model.bin")
        (scorer / WEIGHTS).unlink()
    assert ifd_scores(PAIRS, "some/model") == pytest.approx(ifd_scores(PAIRS, tiny["untied"]), rel=1e-6)
    only_safe = [("some/model", True, False)]
    assert asked == ([*only_safe, ("some/model", False, True)] if pickled else only_safe)
    if pickled:  # and in the key
        weights = torch.load(scorer / "pytorch_model.bin")
        weights["lm_head.weight"][0, 0] += 1
        torch.save(weights, scorer / "pytorch_model.bin")
        assert ifd_scores(PAIRS, scorer) != ifd_scores(PAIRS, tiny["untied"])


def test_a_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refusal("data.scorer", what="some/model"):
        ifd_scores(PAIRS, "some/model")


# The cache


def files(cache):
    return list((cache / "ifd").iterdir())


def test_the_key_is_the_content(tiny, scorer, cache, loads):
    original = ifd_scores(PAIRS, tiny["untied"])
    assert ifd_scores(PAIRS, str(scorer)) == original and loads.call_count == 1  # a copy elsewhere
    before = (scorer / WEIGHTS).stat()
    add_to_weight(scorer / WEIGHTS, "lm_head.weight", (0, 0), 1)
    os.utime(scorer / WEIGHTS, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert ifd_scores(PAIRS, scorer) != original and loads.call_count == 2
    for number, name in enumerate(["config.json", "tokenizer_config.json"], 3):
        edit(scorer / name, note="changed")
        ifd_scores(PAIRS, scorer)
        assert loads.call_count == number
    for number, other in enumerate([PAIRS[::-1], PAIRS[1:], [*PAIRS[1:], ("say cat c", "at 1")]], 5):
        ifd_scores(other, scorer)
        assert loads.call_count == len(files(cache)) == number


@pytest.mark.parametrize("damage", ["cut", "digit", b"", b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_file_is_not_trusted(tiny, cache, loads, damage):
    scores = ifd_scores(PAIRS[:3], tiny["untied"])
    (path,) = files(cache)
    text = path.read_text()
    if damage == "cut":
        damage = text[: len(text) // 2].encode()
    elif damage == "digit":
        damage = text.replace(repr(scores[0]), repr(scores[0] + 1e-9)).encode()
    assert damage != text.encode()
    path.write_bytes(damage)
    assert ifd_scores(PAIRS[:3], tiny["untied"]) == scores and loads.call_count == 2
    assert path.read_text() == text and files(cache) == [path]


def test_scores_that_cannot_be_kept_are_not_lost(tiny, cache, monkeypatch):
    monkeypatch.setattr(select, "write_json", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.warns(UserWarning):
        assert len(ifd_scores(PAIRS[:2], tiny["untied"])) == 2
    assert not cache.exists()


def test_a_reader_beside_several_writers_never_sees_half_a_file(tmp_path):
    path, scores = tmp_path / "folder" / "key.json", [random.random() for _ in range(2000)]
    select._write_cache(path, scores)
    writers = [
        threading.Thread(target=lambda: [select._write_cache(path, scores) for _ in range(10)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert select._read_cache(path) == scores
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left
