"""Rows, labels and sample order."""

from collections import Counter

import pytest
import tiny
import torch

from speft_ds import data
from speft_ds.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def test_loss_is_on_the_response_and_the_end_alone(tokenizer):
    (row,) = data.tokenize([("abc", "de")], tokenizer, chat_template=True, max_length=32)
    batch = data.collate([row, data.Row([1, 2, 3], 2)], tokenizer.pad_token_id, torch.device("cpu"))
    labels = batch["labels"][0][batch["labels"][0] != data.IGNORED].tolist()
    assert tokenizer.decode(labels) == "de</s>"
    assert tokenizer.decode(row.ids) == "<s>abc</s><s>de</s>"
    assert row.ids.count(tokenizer.bos_token_id) == 2  # what the template writes, no more
    assert batch["labels"][1].tolist()[:3] == [data.IGNORED, data.IGNORED, 3]
    assert batch["labels"][1][3:].eq(data.IGNORED).all()


def test_without_template_the_prompt_stands_as_it_is(tokenizer):
    (row,) = data.tokenize([("abc", "de")], tokenizer, chat_template=False, max_length=32)
    assert tokenizer.decode(row.ids) == "abcde</s>"


def test_summed_loss_is_the_cross_entropy_of_the_labelled_tokens():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 6, -100, -100, -100]])
    expected = -sum(logits[r, t - 1].log_softmax(0)[labels[r, t]] for r, t in ((0, 2), (0, 3), (1, 1)))
    assert data.summed_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_kept_logits_are_those_that_count(first):
    logits, labels = torch.randn(2, 5, 7), torch.full((2, 5), data.IGNORED)
    labels[1, first:] = 2
    keep = data.num_logits(labels)
    assert keep == 5 - first + 1
    whole = data.summed_loss(logits, labels)
    assert data.summed_loss(logits[:, -keep:], labels[:, -keep:]).item() == pytest.approx(whole.item())


def test_every_row_once_an_epoch_and_epochs_follow_each_other():
    ids = [number for step in range(10) for number in data.global_batch_ids(12, 0, step, 5)]
    assert len(ids) == 50
    for epoch in range(4):
        assert sorted(ids[epoch * 12 : (epoch + 1) * 12]) == list(range(12))
    assert ids[:12] != ids[12:24]
    assert data.global_batch_ids(12, 0, 7, 5) == ids[35:40]
    assert data.global_batch_ids(12, 1, 0, 5) != ids[:5]
    assert len(data.global_batch_ids(3, 0, 0, 8)) == 8  # a batch larger than the data


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_any_split_computes_the_same_rows(world_size, micro_batch):
    rows = [data.Row(list(range(n + 2)), 1) for n in (3, 1, 9, 4, 4, 7, 2, 5)]
    parts = [data.split_global_batch(rows, micro_batch, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {8 // (world_size * micro_batch)}
    assert all(len(micro) == micro_batch for part in parts for micro in part)
    seen = Counter(len(row.ids) for part in parts for micro in part for row in micro)
    assert seen == Counter(len(row.ids) for row in rows)


def test_a_long_row_and_a_missing_template_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"row 1 has 4 tokens.*max_length=3"):
        data.tokenize([("ab", "c")], tokenizer, chat_template=False, max_length=3)
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        data.tokenize([("ab", "c")], plain, chat_template=True, max_length=30)
