"""IFD scores against a reference without batches, padding and cut logits; the scorer; the choice."""

import itertools
import json
import math
import os
import random
import shutil

import pytest
import tiny as tiny_model
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speft_ds.data import ifd
from speft_ds.data.dataset import Row
from speft_ds.data.ifd import choose, cut, ifd_scores
from unit.data.made import IFD_PAIRS as PAIRS
from unit.data.made import edit_weights, refusal


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


@pytest.fixture
def uncached(monkeypatch):
    monkeypatch.setattr(ifd, "_read_cache", lambda *_: None)


def test_scores_equal_the_reference(tiny):
    ids = token_ids(tiny["untied"], PAIRS)
    assert ids[-1][0][0] == 256  # this prompt's own BOS is not doubled
    ids[-1] = (ids[-1][0][1:], ids[-1][1])
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert scores == reference(tiny["untied"], ids)
    assert scores[1] == 1.0  # no prompt, no help
    assert len({round(score, 4) for score in scores}) == len(PAIRS)
    assert ifd_scores([], tiny["untied"]) == []


def test_neither_other_rows_of_a_batch_nor_kept_logits_matter(tiny, monkeypatch, uncached):
    expected = pytest.approx(ifd_scores(PAIRS, str(tiny["untied"])), rel=1e-5)
    assert ifd_scores(PAIRS[::-1], tiny["untied"])[::-1] == expected
    monkeypatch.setitem(ifd.BATCH_TOKENS, "cpu", 1)  # row by row
    assert ifd_scores(PAIRS, tiny["untied"]) == expected
    original = LlamaForCausalLM.forward

    def forward(self, input_ids, use_cache):  # without logits_to_keep
        return original(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert ifd_scores(PAIRS, tiny["untied"]) == expected


def test_batches_are_longest_first_and_bounded():
    rows = [Row([0] * length, [False] * length) for length in (3, 9, 4, 2, 9, 50)]
    assert list(ifd._batches(rows, 20)) == [[5], [1, 4], [2, 0, 3]]


def test_long_texts_are_cut_to_the_context_or_the_limit(tiny, monkeypatch):
    prompt, response = "".join(map(chr, range(33, 113))) * 8, "the quick brown fox " * 30
    pairs = [(prompt, "short ones"), ("short", response), (prompt, response)]
    (p, short_r), (short_p, r), _ = token_ids(tiny["untied"], pairs)
    # 256 tokens, one of them BOS: the prompt loses its middle, the response its end.
    ids = [(p[:123] + p[-122:], short_r), (short_p, r[:250]), (p[:64] + p[-64:], r[:127])]
    assert all(len(prompt_ids) + len(response_ids) == 255 for prompt_ids, response_ids in ids)
    assert ifd_scores(pairs, tiny["untied"]) == reference(tiny["untied"], ids)
    monkeypatch.setattr(ifd, "MAX_TOKENS", 32)
    expected = reference(tiny["untied"], [(short_p, r[:26])])
    assert ifd_scores([("short", response)], tiny["untied"]) == expected


@pytest.mark.parametrize("room", [2, 3, 4, 7, 8, 17])
def test_cut(room):
    for num_prompt, num_response in itertools.product(range(9), range(1, 9)):
        prompt, response = list(range(num_prompt)), list(range(100, 100 + num_response))
        short_prompt, short_response = cut(prompt, response, room)
        assert len(short_prompt) + len(short_response) == min(room, num_prompt + num_response)
        assert short_response and short_response == response[: len(short_response)]
        assert len(short_response) >= min(num_response, room // 2)
        half = len(short_prompt) // 2
        assert short_prompt[:half] == prompt[:half]
        assert not half or short_prompt[-half:] == prompt[-half:]


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
def test_a_row_without_a_finite_loss_is_named(scorer, value):
    z = AutoTokenizer.from_pretrained(scorer)("z")["input_ids"][0]

    def poison(weights):
        weights["model.embed_tokens.weight"][z] = value

    edit_weights(scorer, poison)
    assert len(ifd_scores(PAIRS, scorer)) == len(PAIRS)  # padding and other rows are not touched
    with refusal("data.scorer", what="row 2"):
        ifd_scores([("say a", "a b c d e f"), ("say z", "ok"), ("x", "y")], scorer)


def test_a_ratio_beyond_float_is_limited(tiny, monkeypatch):
    losses = iter([[2000.0, 0.0], [1.0, 2000.0]])
    monkeypatch.setattr(ifd, "_mean_losses", lambda *_: next(losses))
    scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert scores[0] > 1e300 and scores[1] == 0.0
    assert ifd_scores(PAIRS[:2], tiny["untied"]) == scores  # and comes back from the cache


def test_an_empty_response_is_named(tiny):
    with refusal("data.scorer", what="row 2"):
        ifd_scores([("a", "b"), ("a", "")], tiny["untied"])


# The choice


@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_a_naive_sort(seed):
    draw = random.Random(seed)
    scores = [draw.choice([0.1, 0.5, 0.5, 0.9, draw.uniform(0, 2), 1.0, 1.5]) for _ in range(30)]
    for k in range(32):
        # Rows of 1 or more do not follow from their prompt.
        left, naive = {number: score for number, score in enumerate(scores) if score < 1}, []
        while left and len(naive) < k:
            naive.append(min(left, key=lambda number: (-left[number], number)))
            del left[naive[-1]]
        assert choose(scores, k) == sorted(naive)
    assert choose([1.0], 1) == choose([], 3) == []


# The scorer


def edit_config(folder, **values):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | values))


def link_to_nowhere(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")


DAMAGES = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 30_000),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "bad config": lambda folder: (folder / "config.json").write_text("{"),
    "other config": lambda folder: edit_config(folder, hidden_size=40),
    "a layer missing": lambda folder: edit_config(folder, num_hidden_layers=3),
    "unknown model": lambda folder: edit_config(folder, model_type="nonsense"),
    "bad tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "dangling link": link_to_nowhere,
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_scorer_that_cannot_be_loaded(scorer, damage):
    DAMAGES[damage](scorer)
    with refusal("data.scorer", what=str(scorer)):
        ifd_scores(PAIRS, scorer)


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_pickled_weights(tiny, scorer, loads):
    pickle_weights(scorer)
    assert ifd_scores(PAIRS, scorer) == pytest.approx(ifd_scores(PAIRS, tiny["untied"]), rel=1e-6)
    weights = torch.load(scorer / "pytorch_model.bin")
    weights["lm_head.weight"][0, 0] += 1
    torch.save(weights, scorer / "pytorch_model.bin")
    ifd_scores(PAIRS, scorer)
    assert len(loads) == 3


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_of_the_hub_is_downloaded(tiny, scorer, monkeypatch, pickled):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(scorer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if pickled:
        pickle_weights(scorer)
    assert ifd_scores(PAIRS, "some/model") == pytest.approx(ifd_scores(PAIRS, tiny["untied"]), rel=1e-6)
    only_safe = [("some/model", True, False)]
    assert asked == ([*only_safe, ("some/model", False, True)] if pickled else only_safe)


def test_a_hub_out_of_reach(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(name, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refusal("data.scorer", what="some/model"):
        ifd_scores(PAIRS, "some/model")
