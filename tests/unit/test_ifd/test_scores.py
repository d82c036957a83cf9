"""IFD scores against a reference that has no batches, no padding and no cut logits."""

import itertools
import math

import pytest
import tiny as tiny_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speft_ds.data import ifd
from speft_ds.data.ifd import cut, ifd_scores
from speft_ds.errors import UserError
from unit.test_ifd.made import PAIRS, edit_weights


def mean_loss(model, ids, num_labels):
    """Of the last `num_labels` tokens of one row: every logit, nothing padded."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[-num_labels:].mean()


@torch.no_grad()
def reference(folder, id_pairs, first):
    """IFD of each (prompt ids, response ids)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for prompt, response in id_pairs:
        with_prompt = mean_loss(model, [first, *prompt, *response], len(response))
        alone = mean_loss(model, [first, *response], len(response))
        scores.append(float(with_prompt.exp() / alone.exp()))
    return scores


def token_ids(folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]


def test_scores_equal_the_reference(tiny):
    ids = token_ids(tiny["untied"], PAIRS)
    assert ids[-1][0][0] == 256  # this prompt's own BOS is not doubled
    ids[-1] = (ids[-1][0][1:], ids[-1][1])
    scores = ifd_scores(PAIRS, tiny["untied"])
    assert scores == pytest.approx(reference(tiny["untied"], ids, first=256), rel=1e-5)
    assert scores[1] == 1.0  # no prompt, no help
    assert len({round(score, 4) for score in scores}) == len(PAIRS)


def test_other_rows_of_a_batch_do_not_matter(tiny, monkeypatch):
    together = ifd_scores(PAIRS, str(tiny["tied"]))
    monkeypatch.setattr(ifd, "_read_cache", lambda *_: None)
    assert ifd_scores(PAIRS[::-1], tiny["tied"])[::-1] == pytest.approx(together, rel=1e-5)
    monkeypatch.setitem(ifd.BATCH_TOKENS, "cpu", 1)  # row by row
    assert ifd_scores(PAIRS, tiny["tied"]) == pytest.approx(together, rel=1e-5)


def test_batches_are_longest_first_and_bounded():
    rows = [ifd.Row([0] * length, [(1, length)]) for length in (3, 9, 4, 2, 9, 50)]
    batches = list(ifd._batches(rows, 20))
    assert batches == [[5], [1, 4], [2, 0, 3]]


def test_a_model_without_logits_to_keep(tiny, monkeypatch):
    expected = ifd_scores(PAIRS, tiny["untied"])
    original = LlamaForCausalLM.forward

    def forward(self, input_ids, use_cache):
        return original(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(ifd, "_read_cache", lambda *_: None)
    assert ifd_scores(PAIRS, tiny["untied"]) == pytest.approx(expected, rel=1e-5)


def test_long_texts_are_cut_to_the_context(tiny):
    prompt, response = "".join(map(chr, range(33, 113))) * 8, "the quick brown fox " * 30
    pairs = [(prompt, "short ones"), ("short", response), (prompt, response)]
    (p, short_r), (short_p, r), _ = token_ids(tiny["untied"], pairs)
    # 256 tokens, one of them BOS: the prompt loses its middle, the response its end.
    ids = [(p[:123] + p[-122:], short_r), (short_p, r[:250]), (p[:64] + p[-64:], r[:127])]
    assert all(len(prompt_ids) + len(response_ids) == 255 for prompt_ids, response_ids in ids)
    expected = reference(tiny["untied"], ids, first=256)
    assert ifd_scores(pairs, tiny["untied"]) == pytest.approx(expected, rel=1e-5)


def test_a_long_context_is_cut_to_the_limit(tiny, monkeypatch):
    monkeypatch.setattr(ifd, "MAX_TOKENS", 32)
    pair = ("p" * 5, "".join(map(chr, range(40, 120))))
    ((p, r),) = token_ids(tiny["untied"], [pair])
    expected = reference(tiny["untied"], [(p, r[:26])], first=256)
    assert ifd_scores([pair], tiny["untied"]) == pytest.approx(expected, rel=1e-5)


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
    expected = reference(scorer, token_ids(scorer, PAIRS[:4]), first=257)
    assert ifd_scores(PAIRS[:4], scorer) == pytest.approx(expected, rel=1e-5)


def test_neither_bos_nor_eos(scorer):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(scorer)
    with pytest.raises(UserError, match="neither a BOS nor an EOS") as caught:
        ifd_scores(PAIRS, scorer)
    assert caught.value.where == "data.scorer" and caught.value.fix


def test_no_rows(tiny):
    assert ifd_scores([], tiny["untied"]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_finite_loss_is_named(scorer, value):
    z = AutoTokenizer.from_pretrained(scorer)("z")["input_ids"][0]

    def poison(weights):
        weights["model.embed_tokens.weight"][z] = value

    edit_weights(scorer, poison)
    assert len(ifd_scores(PAIRS, scorer)) == len(PAIRS)  # padding and other rows are not touched
    with pytest.raises(UserError, match="row 2: the scorer's loss on it is nan") as caught:
        ifd_scores([("say a", "a b c d e f"), ("say z", "ok"), ("x", "y")], scorer)
    assert caught.value.where == "data.scorer" and caught.value.fix


def test_a_ratio_beyond_float_is_limited(tiny, monkeypatch):
    losses = iter([[2000.0, 0.0], [1.0, 2000.0]])
    monkeypatch.setattr(ifd, "_mean_losses", lambda *_: next(losses))
    scores = ifd_scores(PAIRS[:2], tiny["untied"])
    assert scores[0] > 1e300 and scores[1] == 0.0
    assert ifd_scores(PAIRS[:2], tiny["untied"]) == scores  # and comes back from the cache


def test_an_empty_response_is_named(tiny):
    with pytest.raises(UserError, match="row 2: the response has no tokens"):
        ifd_scores([("a", "b"), ("a", "")], tiny["untied"])
