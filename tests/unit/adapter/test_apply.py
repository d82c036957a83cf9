"""Adapters on a live model: exact both ways, and refused where they do not belong. No DeepSpeed."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import speft_ds
from speft_ds import apply_adapter, remove_adapter, switch_adapter
from speft_ds.adapter.format import write_adapter
from speft_ds.model.fingerprint import fingerprint
from unit.adapter.samples import assert_same, load, make_adapter, refused, trained, values

NAME, SHAPE = "model.layers.1.mlp.up_proj.weight", [53, 35]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def adapter(tiny, tmp_path):
    """adapter(...) -> the folder of one with three entries of one weight."""

    def write(folder="adapter", name=NAME, shape=SHAPE, **changes):
        facts = {"base": "tiny", "fingerprint": fingerprint(load(tiny["untied"])), "dtype": "float32"}
        entries = [(name, torch.tensor([0, 5, 1854]), torch.tensor([0.5, -1.0, 2.0]))]
        write_adapter(tmp_path / folder, entries, {**facts, "shapes": {name: shape}, **changes})
        return tmp_path / folder

    return write


def refused_on(model, action, *arguments, where="", what=""):
    """Check that an action is refused, and leaves the model as it is."""
    before = values(model)
    refused(lambda: action(model, *arguments), where, what)
    assert_same(values(model), before)


def test_applied_weights_are_base_plus_delta(tiny, adapter):
    model = load(tiny["untied"])
    expected = values(model)
    expected[NAME].view(-1)[[0, 5, 1854]] += torch.tensor([0.5, -1.0, 2.0])
    assert apply_adapter(model, adapter()) is model
    assert_same(values(model), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_are_switched_and_removed_bit_for_bit(tiny, tmp_path, dtype):
    a = make_adapter(tmp_path / "a", tiny["tied"], dtype, seed=1)
    b = make_adapter(tmp_path / "b", tiny["tied"], dtype, seed=2)
    model = load(tiny["tied"], dtype)
    base = values(model)
    expected = {None: base, "a": trained(a, base), "b": trained(b, base)}
    assert not torch.equal(expected["a"][NAME], expected["b"][NAME])
    apply_adapter(model, a, "a")
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


def test_what_does_not_belong_is_refused(tiny, adapter):
    folder, model = adapter(), load(tiny["untied"])
    with torch.no_grad():  # one bit of one weight
        model.model.norm.weight[3] += 1e-7
    refused_on(model, apply_adapter, folder, where=folder)
    half = load(tiny["untied"], torch.bfloat16)
    refused_on(half, apply_adapter, folder, where=folder, what="float32")
    for name, shape in ((NAME, [35, 53]), ("model.layers.7.mlp.up_proj.weight", SHAPE)):
        misfit = adapter("misfit", name=name, shape=shape)
        refused_on(load(tiny["untied"]), apply_adapter, misfit, where=misfit, what=name)
    model = apply_adapter(load(tiny["untied"]), folder)
    refused_on(model, apply_adapter, folder, where=folder, what="'default'")  # a second time
    second = adapter("second", fingerprint="0" * 64)
    refused_on(model, apply_adapter, second, "second", where=second)


def test_a_damaged_file_is_refused(tiny, adapter):
    folder, model = adapter(), load(tiny["untied"])
    path = folder / "adapter.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:20]):
        path.write_bytes(damaged)
        refused_on(model, apply_adapter, folder, where=folder)
    path.unlink()
    refused_on(model, apply_adapter, folder, where=folder)


def test_a_name_that_is_not_there_is_refused(tiny, adapter):
    model = load(tiny["untied"])
    remove_adapter(model)  # nothing to remove
    refused_on(model, switch_adapter, "a", what="'a'")
    apply_adapter(model, adapter(), "b")
    refused_on(model, switch_adapter, "a", what="'a'")
    refused_on(model, remove_adapter, "a", what="'a'")


def test_weights_that_somebody_changed_are_left_alone(tiny, adapter):
    model = apply_adapter(load(tiny["untied"]), adapter())
    weight = model.get_parameter(NAME)
    with torch.no_grad():
        weight.view(-1)[5] += 1
    refused_on(model, remove_adapter, what=NAME)
    refused_on(model, switch_adapter, None, what=NAME)
    with torch.no_grad():
        weight.view(-1)[5] -= 1
    refused_on(model.to(torch.bfloat16), remove_adapter, what=NAME)


def test_a_model_without_adapters_is_looked_at_anew(tiny, adapter):
    model, folder = load(tiny["untied"]), adapter()
    remove_adapter(apply_adapter(model, folder))
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    refused_on(model, apply_adapter, folder, where=folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier_gets_its_head_and_gives_it_back(tiny, tmp_path, dtype):
    torch.manual_seed(3)
    kind, head = AutoModelForSequenceClassification, torch.randn(3, 35).to(dtype)
    model = kind.from_pretrained(tiny["untied"], num_labels=3, dtype=dtype)
    facts = {"classes": ["no", "maybe", "yes"], "pad_token_id": 7, "heads": {"score.weight": head}}
    folder = make_adapter(tmp_path / "a", tiny["untied"], dtype, model=model, **facts)
    base, config = values(model), model.config.to_dict()
    apply_adapter(model, folder)
    assert_same(values(model), {**trained(folder, base), "score.weight": head})
    assert (model.config.id2label, model.config.pad_token_id) == ({0: "no", 1: "maybe", 2: "yes"}, 7)
    switch_adapter(model, None)
    assert_same(values(model), base)
    assert model.config.to_dict() == config
    refused_on(load(tiny["untied"], dtype), apply_adapter, folder, where=folder, what="score.weight")


def test_the_package_offers_them():
    from speft_ds.adapter import apply

    assert speft_ds.apply_adapter is apply.apply_adapter
    with pytest.raises(AttributeError):
        speft_ds.applied  # noqa: B018
