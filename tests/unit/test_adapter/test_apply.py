"""Adapters on a live model: exact both ways, and refused where they do not belong. No DeepSpeed."""

import pytest
import torch
from speft_ds.model.fingerprint import fingerprint
from transformers import AutoModelForSequenceClassification

import speft_ds
from speft_ds import apply_adapter, remove_adapter, switch_adapter
from speft_ds.adapter.format import write_adapter
from speft_ds.errors import UserError
from unit.test_adapter.made import assert_same, load, make_adapter, trained, values

NAME = "model.layers.1.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def adapter(tiny, tmp_path):
    """Three entries of one weight."""
    shape = [53, 35]
    facts = {"base": "tiny", "fingerprint": fingerprint(load(tiny["untied"])), "dtype": "float32"}

    def write(name="adapter", **changes):
        entries = [(NAME, torch.tensor([0, 5, 1854]), torch.tensor([0.5, -1.0, 2.0]))]
        write_adapter(tmp_path / name, entries, {**facts, "shapes": {NAME: shape}, **changes})
        return tmp_path / name

    return write


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
    for name in ["a", None, "b", "b", "a", None, None]:
        switch_adapter(model, name)
        assert_same(values(model), expected[name])
    switch_adapter(model, "b")
    remove_adapter(model, "a")  # which is not in the weights
    assert_same(values(model), expected["b"])
    remove_adapter(model, "b")
    assert_same(values(model), base)
    apply_adapter(model, a)
    remove_adapter(model)
    assert_same(values(model), base)


def refuse(action, model, *messages):
    before = values(model)
    with pytest.raises(UserError) as caught:
        action()
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert_same(values(model), before)


def test_another_base_is_refused(tiny, adapter):
    model = load(tiny["untied"])
    with torch.no_grad():  # one bit of one weight
        model.model.norm.weight[3] += 1e-7
    refuse(lambda: apply_adapter(model, adapter()), model, "another base")


def test_a_second_adapter_of_another_base_is_refused(tiny, adapter):
    model = apply_adapter(load(tiny["untied"]), adapter())
    other = adapter("other", fingerprint="0" * 64)
    refuse(lambda: apply_adapter(model, other, "other"), model, "another base")


def test_a_second_application_is_refused(tiny, adapter):
    folder = adapter()
    model = apply_adapter(load(tiny["untied"]), folder)
    refuse(lambda: apply_adapter(model, folder), model, "already applied", "remove_adapter")


def test_a_name_that_is_not_there_is_refused(tiny, adapter):
    model = load(tiny["untied"])
    refuse(lambda: switch_adapter(model, "a"), model, "no adapter 'a'")
    refuse(lambda: remove_adapter(model, "a"), model, "no adapter 'a'")
    remove_adapter(model)  # nothing to remove
    apply_adapter(model, adapter(), "b")
    refuse(lambda: switch_adapter(model, "a"), model, "no adapter 'a'", "b")


def test_weights_that_somebody_changed_are_left_alone(tiny, adapter):
    model = apply_adapter(load(tiny["untied"]), adapter())
    weight = model.get_parameter(NAME)
    with torch.no_grad():
        weight.view(-1)[5] += 1
    for action in (remove_adapter, lambda model: switch_adapter(model, None)):
        refuse(lambda action=action: action(model), model, NAME, "has changed")
    with torch.no_grad():
        weight.view(-1)[5] -= 1
    model.to(torch.bfloat16)
    refuse(lambda: remove_adapter(model), model, NAME, "has changed")


def test_a_model_without_adapters_is_looked_at_anew(tiny, adapter):
    model, folder = load(tiny["untied"]), adapter()
    apply_adapter(model, folder)
    remove_adapter(model)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    refuse(lambda: apply_adapter(model, folder), model, "another base")


def test_another_dtype_is_refused(tiny, adapter):
    model = load(tiny["untied"], torch.bfloat16)
    refuse(lambda: apply_adapter(model, adapter()), model, "dtype=torch.float32")


@pytest.mark.parametrize("name, shape", [(NAME, [35, 53]), ("model.layers.7.mlp.up_proj.weight", [53, 35])])
def test_another_model_is_refused(tiny, tmp_path, name, shape):
    model = load(tiny["untied"])
    facts = {"base": "", "fingerprint": fingerprint(model), "dtype": "float32", "shapes": {name: shape}}
    write_adapter(tmp_path / "a", [(name, torch.tensor([1]), torch.ones(1))], facts)
    refuse(lambda: apply_adapter(model, tmp_path / "a"), model, "for another model", name)


def test_a_damaged_file_is_refused(tiny, adapter):
    folder, model = adapter(), load(tiny["untied"])
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refuse(lambda: apply_adapter(model, folder), model, "damaged")
    path.write_bytes(content[:20])
    refuse(lambda: apply_adapter(model, folder), model, "not a readable adapter")
    path.unlink()
    refuse(lambda: apply_adapter(model, folder), model, "not a readable adapter")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier_gets_its_head_and_gives_it_back(tiny, tmp_path, dtype):
    def classifier():
        torch.manual_seed(3)
        kind = AutoModelForSequenceClassification
        return kind.from_pretrained(tiny["untied"], num_labels=3, dtype=dtype)

    model, head = classifier(), torch.randn(3, 35).to(dtype)
    facts = {"classes": ["no", "maybe", "yes"], "pad_token_id": 7}
    heads = {"score.weight": head}
    folder = make_adapter(tmp_path / "a", tiny["untied"], dtype, model=model, heads=heads, **facts)
    base, config = values(model), model.config.to_dict()
    apply_adapter(model, folder)
    assert_same(values(model), {**trained(folder, base), "score.weight": head})
    assert (model.config.id2label, model.config.pad_token_id) == ({0: "no", 1: "maybe", 2: "yes"}, 7)
    switch_adapter(model, None)
    assert_same(values(model), base)
    assert model.config.to_dict() == config
    refuse(lambda: apply_adapter(load(tiny["untied"], dtype), folder), model, "num_labels=3")


def test_the_package_offers_them():
    from speft_ds.adapter import apply

    assert speft_ds.apply_adapter is apply.apply_adapter
    with pytest.raises(AttributeError):
        speft_ds.applied  # noqa: B018
