"""Batches and their loss: packing and padding change nothing of what a row computes."""

from collections import Counter

import pytest
import tiny
import torch

from speft_ds.data.collate import (
    IGNORED,
    collate,
    num_logits,
    split_global_batch,
    summed_class_loss,
    summed_loss,
)
from speft_ds.data.dataset import Row, pack
from speft_ds.errors import UserError
from speft_ds.model.loss import NextToken, RowClass

CPU = torch.device("cpu")
ROWS = [
    Row([5, 6, 7, 8, 9], [(2, 5)]),
    Row([10, 11, 5], [(1, 3)]),
    Row([6] * 9, [(3, 5), (7, 9)]),
    Row([12, 13, 14, 15], [(3, 4)]),
    Row([5, 6, 7, 8, 9, 10, 11], [(1, 7)]),
]


# Batches


def test_rows_are_padded_on_the_right_and_learn_their_spans():
    batch = collate([ROWS[0], ROWS[1], Row([6, 7], [])], 3, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 5, 3, 3], [6, 7, 3, 3, 3]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 7, 8, 9],
        [IGNORED, 11, 5, IGNORED, IGNORED],
        [IGNORED] * 5,
    ]
    assert set(batch) == {"input_ids", "labels"} and batch["input_ids"].dtype == torch.int64


def test_the_loss_is_on_the_response_and_its_end_alone():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("<s>abc</s><s>de</s>", add_special_tokens=False)["input_ids"]
    labels = collate([Row(ids, [(6, 9)]), ROWS[0]], tokenizer.pad_token_id, CPU)["labels"]
    assert tokenizer.decode(labels[0][labels[0] != IGNORED].tolist()) == "de</s>"


def test_a_padding_that_is_the_eos_takes_no_label_away():
    batch = collate([Row([5, 2], [(1, 2)]), ROWS[0]], 2, CPU)
    assert batch["labels"][0].tolist() == [IGNORED, 2, IGNORED, IGNORED, IGNORED]


def test_positions_restart_at_each_packed_row_and_at_the_padding():
    batch = collate([pack(ROWS[:3]), pack(ROWS[3:]), ROWS[0]], 0, CPU)
    assert batch["position_ids"].tolist() == [
        [*range(5), *range(3), *range(9)],
        [*range(4), *range(7), *range(6)],
        [*range(5), *range(12)],
    ]
    learnt = (batch["labels"] != IGNORED).sum(1).tolist()
    assert learnt == [9, 7, 3]
    assert batch["labels"][0][:8].tolist() == [IGNORED, IGNORED, 7, 8, 9, IGNORED, 11, 5]


def test_a_batch_to_classify_has_one_label_a_row():
    batch = collate([Row([5, 6, 2], [], label=1), Row([7, 2], [], label=0)], 0, CPU)
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_any_split_computes_the_same_rows(world_size, micro_batch):
    rows = [Row(list(range(n + 2)), [(1, n + 2)]) for n in (3, 1, 9, 4, 4, 7, 2, 5)]
    parts = [split_global_batch(rows, micro_batch, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {8 // (world_size * micro_batch)}
    assert all(len(micro) == micro_batch for part in parts for micro in part)
    seen = Counter(len(row.ids) for part in parts for micro in part for row in micro)
    assert seen == Counter(len(row.ids) for row in rows)


def test_ranks_that_run_side_by_side_have_rows_of_about_one_length():
    rows = [Row([0] * n, [(1, n)]) for n in (2, 50, 3, 49, 4, 48, 5, 47)]
    parts = [split_global_batch(rows, 2, rank, 2) for rank in range(2)]
    lengths = [[sorted(len(row.ids) for row in micro) for micro in part] for part in parts]
    assert lengths == [[[48, 50], [3, 5]], [[47, 49], [2, 4]]]


# Losses


def test_summed_loss_is_the_cross_entropy_of_the_labelled_tokens():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 6, -100, -100, -100]])
    places = ((0, 2), (0, 3), (1, 1))
    for temperature in (1.0, 2.5):
        scaled = logits / temperature
        expected = -sum(scaled[r, t - 1].log_softmax(0)[labels[r, t]] for r, t in places)
        loss = summed_loss(logits, labels, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_summed_class_loss_is_the_cross_entropy_of_the_classes():
    logits, labels = torch.randn(3, 4), torch.tensor([3, 0, 2])
    expected = -sum(row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True))
    assert summed_class_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_kept_logits_are_those_that_count(first):
    logits, labels = torch.randn(2, 5, 7), torch.full((2, 5), IGNORED)
    labels[1, first:] = 2
    keep = num_logits(labels)
    assert keep == 5 - first + 1
    whole = summed_loss(logits, labels)
    assert summed_loss(logits[:, -keep:], labels[:, -keep:]).item() == pytest.approx(whole.item())


# Models


def make_model(family, attention=None, task="CausalLM"):
    import transformers

    sizes = dict(
        vocab_size=32,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation=attention,
    )
    if family == "OPT":
        own = dict(ffn_dim=40, word_embed_proj_dim=24, dropout=0.0, do_layer_norm_before=True)
    else:
        own = dict(intermediate_size=40, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    if family == "Gemma2":  # a window that is shorter than a pack, in every second layer
        own |= dict(sliding_window=8, query_pre_attn_scalar=8)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **own)
    name = f"{family}For{task}"
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():  # OPT starts so small that rows hardly look at each other
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


FAMILIES = ["Llama", "Qwen2", "Gemma2"]
ATTENTIONS = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager")]
ATTENTIONS.remove(("Gemma2", "sdpa"))  # transformers has Gemma2's capped logits in eager attention alone


def one_by_one(model, rows):
    return [model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0] for row in rows]


@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
@torch.no_grad()
def test_packed_rows_do_not_see_each_other(family, attention):
    model = make_model(family, attention)
    packs = [pack(ROWS[:3]), pack(ROWS[3:]), ROWS[0]]
    batch = collate(packs, 0, CPU)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits
    alone = one_by_one(model, ROWS)
    for number, row in enumerate([*ROWS, ROWS[0]]):
        where, start = [(0, 0), (0, 5), (0, 8), (1, 0), (1, 4), (2, 0)][number]
        packed = logits[where, start : start + len(row.ids)]
        torch.testing.assert_close(packed, alone[number % 5], atol=1e-5, rtol=1e-5)
    # The test can tell: without the positions the second row sees the first.
    blind = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert (blind[0, 5:8] - alone[1]).abs().max() > 1e-2


def test_a_model_whose_packed_rows_would_see_each_other_is_refused():
    with pytest.raises(UserError, match=r"data\.packing=false"):
        NextToken(make_model("OPT"), packing=True)


@pytest.mark.parametrize(("family", "attention"), [*ATTENTIONS, ("OPT", "sdpa"), ("OPT", "eager")])
@torch.no_grad()
def test_padding_changes_no_logits(family, attention):
    model = make_model(family, attention)
    batch = collate(ROWS, 0, CPU)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    for row, padded, alone in zip(ROWS, logits, one_by_one(model, ROWS), strict=True):
        torch.testing.assert_close(padded[: len(row.ids)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "OPT"])
def test_the_loss_of_a_batch_and_its_gradient_are_the_sums_over_its_rows(family):
    model = make_model(family)
    packed = [pack(ROWS[:3]), pack(ROWS[3:])] if family != "OPT" else ROWS
    weight = next(p for name, p in model.named_parameters() if name.endswith("q_proj.weight"))

    def loss_of(rows):
        objective = NextToken(model, packing=family != "OPT")
        loss, num_correct = objective(model, collate(rows, 0, CPU))
        assert num_correct is None
        return loss, torch.autograd.grad(loss, weight)[0]

    loss, gradient = loss_of(packed)
    parts = [loss_of([row]) for row in ROWS]
    by_hand = 0.0
    for row, logits in zip(ROWS, one_by_one(model, ROWS), strict=True):
        for start, stop in row.spans:
            for place in range(start, stop):
                by_hand -= logits[place - 1].log_softmax(0)[row.ids[place]].item()
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert loss.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-5)
    torch.testing.assert_close(gradient, sum(part for _, part in parts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "OPT"])
@torch.no_grad()
def test_a_class_is_predicted_from_the_last_token_of_a_row(family):
    model = make_model(family, task="SequenceClassification")
    rows = [Row([*row.ids, 2], [], label=number % 2) for number, row in enumerate(ROWS)]
    alone = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows])
    loss, num_correct = RowClass()(model, collate(rows, 0, CPU))
    labels = torch.tensor([row.label for row in rows])
    expected = torch.nn.functional.cross_entropy(alone, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert num_correct == (alone.argmax(1) == labels).sum()
