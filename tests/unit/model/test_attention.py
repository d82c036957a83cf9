"""Attention of packed rows: what kernels are told, by whom the device is read, what a device cannot do."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from distributed.step_checks import HostReads
from transformers import masking_utils, modeling_flash_attention_utils, modeling_utils
from transformers.integrations.flash_attention import flash_attention_forward

from speft_ds.data.collate import collate
from speft_ds.data.dataset import pack
from speft_ds.model import attention
from speft_ds.model.linear_cross_entropy import find_head_loss
from speft_ds.model.loss import NextToken, RowClass
from unit.data.made import refusal
from unit.data.test_collate import CPU, ROWS
from unit.model.test_loss import make_model

FLASH = "flash_attention_of_a_test"
PACKS = [pack(ROWS[:3]), pack(ROWS[3:])]
SEGMENTS = [5, 3, 9, 4, 7, 6]  # the last one is padding


def causal(q, k, v, softmax_scale):
    """[tokens, heads, width] each; q may have more heads than k and v."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.fixture
def flash(monkeypatch):
    """Flash attention as transformers calls it, with its kernels written out; what they are called with."""
    calls = []

    def of_batch(q, k, v, softmax_scale, **options):
        calls.append(("batch", list(q.shape[:2])))
        return torch.stack([causal(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    def of_segments(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, **options):
        calls.append(("segments", cu_seqlens_q, max_seqlen_q))
        assert options["causal"] and options["cu_seqlens_k"] is cu_seqlens_q
        assert options["max_seqlen_k"] is max_seqlen_q
        lengths = known or cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split_with_sizes(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([causal(*part, softmax_scale) for part in parts])

    known = []  # lengths of the segments, for a kernel that asks no device
    options = partial(
        modeling_flash_attention_utils._process_flash_attention_kwargs,
        supports_mapping=defaultdict(bool, max_seqlen_q=True, max_seqlen_k=True),
    )
    functions = ((of_batch, of_segments, None, None, None), (options, None))
    name = "lazy_import_flash_attention"
    monkeypatch.setattr(modeling_flash_attention_utils, name, lambda *_, **__: functions)
    monkeypatch.setattr(modeling_utils, name, lambda *_, **__: functions)
    registers = (modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface)
    made = (flash_attention_forward, masking_utils.flash_attention_mask)
    for register, function in zip(registers, made, strict=True):
        monkeypatch.setitem(register._global_mapping, FLASH, function)
    return SimpleNamespace(calls=calls, known=known)


def loss_and_gradient(model, rows, head_loss=True, **changes):
    objective = NextToken(model, packing=True, head_loss=find_head_loss(model) if head_loss else None)
    for name, value in changes.items():
        setattr(objective, name, value)
    model.lm_head.requires_grad_(not head_loss)
    weight = model.model.layers[0].self_attn.q_proj.weight
    loss = objective(model, collate(rows, 0, CPU))[0]
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("head_loss", [True, False])
@pytest.mark.parametrize("takes_lengths", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_flash_attention_of_packs_is_that_of_each_row(flash, family, takes_lengths, head_loss):
    """Also where a model does not pass on where the rows start."""
    alone = [loss_and_gradient(make_model(family, "sdpa"), [row]) for row in ROWS]
    how = attention.FlashInputs(takes_lengths)
    model = make_model(family, FLASH)
    flash.calls.clear()
    loss, gradient = loss_and_gradient(model, PACKS, head_loss, flash=how)
    torch.testing.assert_close(loss, sum(one for one, _ in alone))
    torch.testing.assert_close(gradient, sum(of_row for _, of_row in alone), atol=1e-5, rtol=1e-5)
    kinds = [call[0] for call in flash.calls[-2:]]
    assert kinds == ["segments"] * 2  # of two layers
    for _, edges, longest in flash.calls[-2:]:
        assert edges.diff().tolist() == SEGMENTS and int(longest) == max(SEGMENTS)
        assert isinstance(longest, int) == takes_lengths


@pytest.mark.parametrize(
    ("rows", "segments"), [(PACKS, SEGMENTS), (ROWS[2:3], [9]), (ROWS[:2], None)], ids=["packs", "one", "two"]
)
@pytest.mark.parametrize("head_loss", [True, False])
def test_no_layer_reads_the_device(flash, rows, segments, head_loss):
    """The model's own way does, in every layer."""
    model, batch = make_model("Llama", FLASH).requires_grad_(False), collate(rows, 0, CPU)
    objective = NextToken(model, packing=True, head_loss=find_head_loss(model) if head_loss else None)
    assert objective.flash.takes_lengths
    flash.known[:] = segments or []
    with HostReads() as ours:
        objective(model, batch)
    assert not ours.by
    assert flash.calls[-1][0] == ("segments" if segments else "batch")
    objective.flash = attention.FlashInputs(takes_lengths=False)
    with HostReads() as without:
        objective(model, batch)
    assert (sum(without.by.values()) >= 2) == (segments is not None)


def test_a_classifier_reads_no_device_for_a_single_row(flash):
    model = make_model("Llama", FLASH, task="SequenceClassification")
    rows = [type(ROWS[0])([5, 6, 2], [0] * 3, label=1)]
    objective = RowClass(flash=attention.FlashInputs.of(model))
    flash.calls.clear()
    objective(model, collate(rows, 0, CPU))
    assert [call[0] for call in flash.calls] == ["segments"] * 2


def test_a_model_whose_attention_is_another_gets_its_rows_as_they_are():
    assert attention.FlashInputs.of(make_model("Llama", "sdpa")) is None


def test_which_rows_are_packed_is_said_as_transformers_reads_it():
    positions = collate([*PACKS, ROWS[0]], 0, CPU)["position_ids"]
    expected = masking_utils.find_packed_sequence_indices(positions)
    original = masking_utils.find_packed_sequence_indices
    with attention.reads_packing(True):
        assert torch.equal(masking_utils.find_packed_sequence_indices(positions), expected)
    with attention.reads_packing(False):
        assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices is original


def test_flex_attention_cannot_train_on_a_cpu():
    """As torch says."""
    attention.check_device("flex_attention", "cuda", "model.attention")
    attention.check_device("sdpa", "cpu", "model.attention")
    with refusal("model.attention", "model.attention=sdpa"):
        attention.check_device("flex_attention", "cpu", "model.attention")
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.zeros(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(NotImplementedError):
        flex_attention(x, x, x).sum().backward()
