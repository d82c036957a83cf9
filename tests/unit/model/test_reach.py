"""What a text forward reaches, asked of real model classes."""

from contextlib import nullcontext

import pytest
import torch
from families import tiny_config
from transformers import AutoModelForCausalLM

from speft_ds.errors import UserError
from speft_ds.model.fake_tensors import fake_tensors
from speft_ds.model.reach import find_reach
from speft_ds.model.targets import find_targets


def reach_of(family: str, fake: bool = False):
    torch.manual_seed(0)
    with fake_tensors() if fake else nullcontext():
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        targets = find_targets(model.requires_grad_(False), None)
        for target in targets.values():
            target.adapt()
        return find_reach(model, targets), targets


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("family", "left_out"),
    [("llama", None), ("mixtral", None), ("gpt_oss", None), ("mamba", "dt_proj"), ("bart", "encoder_attn")],
)
def test_what_no_backward_feeds_is_named(family, left_out, fake):
    reach, targets = reach_of(family, fake)
    starved = [name for name in targets if name not in reach.fed]
    if left_out is None:
        assert not starved
    else:
        assert starved and all(left_out in name for name in starved)
    kept = {name: target for name, target in targets.items() if name in reach.fed}
    assert len(reach.fed) == len(kept) and 0.8 < reach.coverage(kept) <= 1.0


def test_what_is_used_without_its_module_counts_as_the_decoders():
    """Mamba multiplies by `dt_proj.weight` itself; Bart never looks at its cross-attention."""
    mamba, targets = reach_of("mamba")
    assert any("dt_proj" in name for name in mamba.decoder)
    bart, _ = reach_of("bart")
    assert not any("encoder_attn" in name for name in bart.decoder)
    fed = {name: target for name, target in targets.items() if name in mamba.fed}
    share = sum(mamba.elements[name] for name in fed) / sum(mamba.elements[name] for name in mamba.decoder)
    assert mamba.coverage(fed) == share


@pytest.mark.parametrize(("family", "looks_ahead"), [("llama", False), ("mixtral", False), ("bert", True)])
def test_a_model_that_looks_ahead_is_found(family, looks_ahead):
    assert reach_of(family)[0].looks_ahead is looks_ahead


def test_a_little_reach_is_a_warning():
    reach, targets = reach_of("llama")
    few = {name: target for name, target in targets.items() if "q_proj" in name}
    line, *more = reach.lines(few, [], True)
    assert "2 of" in line and "mlp.gate_proj" in line
    assert len(more) == 1 and "mask.targets" in more[0]
    assert len(reach.lines(targets, [], False)) == 1


def test_the_parts_of_a_fused_weight_are_named():
    reach, targets = reach_of("phi3")
    _, note = reach.lines(targets, [], False)
    assert "self_attn.qkv_proj (q, k, v)" in note and "mlp.gate_up_proj (gate, up)" in note
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("phi3"))
    with pytest.raises(UserError) as caught:
        find_targets(model, ["q_proj"])
    assert "qkv_proj (q, k, v)" in caught.value.fix
