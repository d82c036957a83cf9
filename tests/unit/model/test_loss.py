"""Losses and objectives: packing and padding change nothing of what a row computes."""

import pytest
import torch

from speft_ds.data.collate import IGNORED, collate, num_logits
from speft_ds.data.dataset import Row, pack
from speft_ds.model.linear_cross_entropy import find_head_loss
from speft_ds.model.longrope import rotate_by_row
from speft_ds.model.loss import NextToken, RowClass, summed_loss
from unit.data.made import refusal
from unit.data.test_collate import CPU, ROWS


def test_summed_loss_is_that_of_the_targets():
    logits, targets = torch.randn(3, 4), torch.tensor([3, 0, 2])
    for temperature in (1.0, 2.5):
        rows = zip(logits / temperature, targets, strict=True)
        expected = -sum(row.log_softmax(0)[target] for row, target in rows)
        assert summed_loss(logits, targets, temperature).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_kept_logits_are_those_that_count(first):
    labels = torch.full((2, 5), IGNORED)
    labels[1, first:] = 2
    assert num_logits(labels) == 5 - first + 1
    assert num_logits(torch.full((2, 5), IGNORED)) == 1


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
    if family == "Phi3":  # rows of 3 and of 4 tokens are rotated by the short factors, the others by the long
        factors = dict(short_factor=[1.0] * 3, long_factor=[3.0, 5.0, 9.0])
        own.pop("head_dim")
        own |= dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, **factors))
        own |= dict(original_max_position_embeddings=4)
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
    with refusal("data.packing", "data.packing=false"):
        NextToken(make_model("OPT"), packing=True)


@pytest.mark.parametrize(("family", "attention"), [*ATTENTIONS, ("OPT", "sdpa"), ("OPT", "eager")])
@torch.no_grad()
def test_padding_changes_no_logits(family, attention):
    model = make_model(family, attention)
    batch = collate(ROWS, 0, CPU)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    for row, padded, alone in zip(ROWS, logits, one_by_one(model, ROWS), strict=True):
        torch.testing.assert_close(padded[: len(row.ids)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "OPT", "Phi3"])
def test_the_loss_of_a_batch_and_its_gradient_are_the_sums_over_its_rows(family):
    model = make_model(family)
    switch = rotate_by_row(model)
    assert switch == (4 if family == "Phi3" else None)
    packed = [pack(ROWS[:3]), pack(ROWS[3:])] if family != "OPT" else ROWS
    ends = ("q_proj.weight", "qkv_proj.weight")
    weight = next(p for name, p in model.named_parameters() if name.endswith(ends))

    def loss_of(rows):
        objective = NextToken(model, family != "OPT", switch=switch, head_loss=find_head_loss(model))
        loss, num_correct = objective(model, collate(rows, 0, CPU))
        assert num_correct is None
        return loss, torch.autograd.grad(loss, weight)[0]

    loss, gradient = loss_of(packed)
    parts = [loss_of([row]) for row in ROWS]
    by_hand = 0.0
    for row, logits in zip(ROWS, one_by_one(make_model(family), ROWS), strict=True):
        for place, is_label in enumerate(row.loss_mask):
            if is_label:
                by_hand -= logits[place - 1].log_softmax(0)[row.ids[place]].item()
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    for found, grad in ((loss, gradient), loss_of(ROWS)):
        assert found.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-5)
        torch.testing.assert_close(grad, sum(part for _, part in parts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "OPT", "Phi3"])
@torch.no_grad()
def test_a_class_is_predicted_from_the_last_token_of_a_row(family):
    model = make_model(family, task="SequenceClassification")
    rows = [
        Row([*row.ids, 2], [False] * (len(row.ids) + 1), label=number % 2) for number, row in enumerate(ROWS)
    ]
    alone = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows])
    loss, num_correct = RowClass(rotate_by_row(model))(model, collate(rows, 0, CPU))
    labels = torch.tensor([row.label for row in rows])
    expected = torch.nn.functional.cross_entropy(alone, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert num_correct == (alone.argmax(1) == labels).sum()
