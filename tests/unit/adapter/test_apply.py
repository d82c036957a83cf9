"""Adapters on a live model: exact both ways, and refused where they do not belong. No DeepSpeed."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from speft_ds import apply_adapter, remove_adapter, switch_adapter
from unit.adapter.samples import (
    UP1,
    assert_same,
    classifier,
    load,
    make_adapter,
    make_classifier,
    read,
    refused,
    trained,
    values,
    write,
)
from unit.saved import flip

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def adapter(tiny, tmp_path):
    return make_adapter(tmp_path / "adapter", tiny["untied"])


def refused_on(model, action, *arguments, where="", what=""):
    """Check that an action is refused, and leaves the model as it is."""
    before = values(model)
    refused(lambda: action(model, *arguments), where, what)
    assert_same(values(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_are_switched_and_removed_bit_for_bit(tiny, tmp_path, dtype):
    a = make_adapter(tmp_path / "a", tiny["tied"], dtype, seed=1)
    b = make_adapter(tmp_path / "b", tiny["tied"], dtype, seed=2)
    model = load(tiny["tied"], dtype)
    base = values(model)
    expected = {None: base, "a": trained(a, base), "b": trained(b, base)}
    assert not torch.equal(expected["a"][UP1], expected["b"][UP1])
    assert apply_adapter(model, a, "a") is model
    assert_same(values(model), expected["a"])
    apply_adapter(model, b, "b")
    assert_same(values(model), expected["b"])
    for name in ["a", None, "b", "b", "a", None, None, "b"]:
        switch_adapter(model, name)
        assert_same(values(model), expected[name])
    remove_adapter(model, "a")  # which is not in the weights
    assert_same(values(model), expected["b"])
    remove_adapter(model, "b")
    assert_same(values(model), base)
    apply_adapter(model, a)
    remove_adapter(model)
    assert_same(values(model), base)


def test_what_does_not_belong_is_refused(tiny, tmp_path, adapter):
    model = load(tiny["untied"])
    with torch.no_grad():  # one bit of one weight
        model.model.norm.weight[3] += 1e-7
    refused_on(model, apply_adapter, adapter, where=adapter)
    half = load(tiny["untied"], torch.bfloat16)
    refused_on(half, apply_adapter, adapter, where=adapter, what="float32")
    model = load(tiny["untied"])
    for name, shape in ((UP1, [35, 53]), ("model.layers.7.mlp.up_proj.weight", [53, 35])):
        misfit = write(tmp_path / "misfit", {name: torch.ones(shape)})
        refused_on(model, apply_adapter, misfit, where=misfit, what=name)
    config = AutoConfig.from_pretrained(tiny["untied"])
    with torch.device("meta"):  # as what `device_map` offloads
        away = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    refused(lambda: apply_adapter(away, adapter), "apply_adapter", "no values")
    apply_adapter(model, adapter)
    refused_on(model, apply_adapter, adapter, where=adapter, what="'default'")  # a second time
    other = make_adapter(tmp_path / "other", tiny["untied"], fingerprint="0" * 64)
    refused_on(model, apply_adapter, other, "other", where=other)
    flip(adapter / "adapter.safetensors", -1)
    refused_on(model, apply_adapter, adapter, "damaged", where=adapter)


def test_a_name_that_is_not_there_is_refused(tiny, adapter):
    model = load(tiny["untied"])
    remove_adapter(model)  # nothing to remove
    refused_on(model, switch_adapter, "a", what="'a'")
    apply_adapter(model, adapter, "b")
    refused_on(model, switch_adapter, "a", what="'a'")
    refused_on(model, remove_adapter, "a", what="'a'")


def test_weights_that_somebody_changed_are_left_alone(tiny, adapter):
    model = apply_adapter(load(tiny["untied"]), adapter)
    weight, changed = model.get_parameter(UP1), read(adapter)[UP1].nonzero()[0].tolist()
    before = weight.detach().clone()
    with torch.no_grad():
        weight[*changed] += 1
    refused_on(model, remove_adapter, what=UP1)
    refused_on(model, switch_adapter, None, what=UP1)
    with torch.no_grad():
        weight.copy_(before)
    refused_on(model.to(torch.bfloat16), remove_adapter)


def test_a_model_without_adapters_is_looked_at_anew(tiny, adapter):
    model = load(tiny["untied"])
    remove_adapter(apply_adapter(model, adapter))
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    refused_on(model, apply_adapter, adapter, where=adapter)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier_gets_its_head_and_gives_it_back(tiny, tmp_path, dtype):
    folder, head = make_classifier(tmp_path / "a", tiny["untied"], dtype)
    model = classifier(tiny["untied"], dtype)
    base, config = values(model), model.config.to_dict()
    apply_adapter(model, folder)
    assert_same(values(model), {**trained(folder, base), "score.weight": head})
    assert (model.config.id2label, model.config.pad_token_id) == ({0: "no", 1: "maybe", 2: "yes"}, 7)
    switch_adapter(model, None)
    assert_same(values(model), base)
    assert model.config.to_dict() == config
    refused_on(load(tiny["untied"], dtype), apply_adapter, folder, where=folder, what="score.weight")
