"""Targets and fingerprints on plain models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from speft_ds.errors import UserError
from speft_ds.model.fingerprint import element_hash, fingerprint
from speft_ds.model.targets import find_targets, tied_targets


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny["tied"], dtype=torch.float32)


def test_default_targets_are_the_linears_of_the_decoder_layers(model):
    names = list(find_targets(model, None))
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_patterns_name_modules_or_their_last_part(model):
    assert len(find_targets(model, ["q_proj"])) == 2
    assert len(find_targets(model, ["*.layers.1.mlp.*"])) == 3
    assert len(find_targets(model, ["q_proj", "v_proj"])) == 4


def test_no_target_is_an_error_that_lists_the_names(model):
    with pytest.raises(UserError, match="no weight matches c_attn") as caught:
        find_targets(model, ["q_proj", "c_attn"])
    assert "o_proj" in str(caught.value)
    with pytest.raises(UserError) as caught:
        find_targets(nn.Sequential(nn.Conv1d(1, 1, 1)), None)
    assert caught.value.where == "mask.targets"


def test_tied_targets_are_found(model):
    assert tied_targets(model, find_targets(model, ["lm_head"])) == ["lm_head.weight"]
    assert tied_targets(model, find_targets(model, None)) == []


def test_shard_hashes_add_up(model):
    values = torch.randn(101).to(torch.bfloat16)
    whole = element_hash(values, 0)
    parts = element_hash(values[:40], 0) + element_hash(values[40:], 40)
    assert parts == whole
    assert element_hash(values.flip(0), 0) != whole


def test_fingerprint_sees_one_bit_and_a_swap(model):
    before = fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        saved = weight[0, :2].clone()
        weight[0, :2] = saved.flip(0)
        assert fingerprint(model) != before
        weight[0, :2] = saved
        assert fingerprint(model) == before
        weight.view(torch.int32)[0, 0] ^= 1
        assert fingerprint(model) != before
        weight[0, :2] = saved
