"""Heads and channels of families of models: two of them can change places, and nothing but these can."""

import pytest
import torch
from families import tiny_config
from transformers import AutoModelForCausalLM

from speft_ds.errors import UserError
from speft_ds.model.targets import find_targets
from speft_ds.selection.units import Units, find_units, in_units

FOUND = {  # granularity, family -> modules that have units, units of each
    ("head", "llama"): (2, 2),  # of 4 query heads each, in pairs
    ("head", "qwen2"): (2, 2),  # biases
    ("head", "qwen3"): (2, 2),  # norms of queries and keys
    ("head", "opt"): (2, 4),
    ("head", "phi"): (2, 2),
    ("head", "mixtral"): (2, 2),
    ("channel", "llama"): (2, 48),
    ("channel", "gemma2"): (2, 48),
    ("channel", "gpt2"): (2, 48),  # stored [in, out]
    ("channel", "opt"): (2, 48),
    ("channel", "phi"): (2, 48),
    ("channel", "bloom"): (2, 128),
    ("channel", "deepseek_v3"): (2, None),  # an MLP and a shared expert; the others are in one stack
}
REFUSED = {  # -> a weight that is to blame
    ("head", "gpt2"): "c_attn",
    ("head", "deepseek_v3"): "q_a_proj",
    ("head", "qwen3_next"): "q_proj 64",  # with gates in it
    ("head", "mamba"): "in_proj",
    ("channel", "mamba"): "in_proj",
    ("channel", "phi3"): "gate_up_proj",
}


def make(family: str):
    torch.manual_seed(0)
    more = {"layer_types": ["full_attention"] * 2} if family == "qwen3_next" else {}
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def swap(model, units: Units, names: list[str]) -> None:
    """Units 0 and 1 change places in these weights, and in the biases of those that write."""
    reader = list(units.bands)[-1]
    for name in names:
        flat = model.get_parameter(name).data.view(-1)
        one, other = (units.bands[name].entries(torch.tensor([unit])) for unit in (0, 1))
        flat[one], flat[other] = flat[other].clone(), flat[one].clone()
        bias = getattr(model.get_submodule(name.removesuffix(".weight")), "bias", None)
        if bias is not None and name != reader:
            by_unit = bias.data.view(units.count, -1)
            by_unit[[0, 1]] = by_unit[[1, 0]]


@pytest.mark.parametrize(("granularity", "family"), FOUND)
def test_two_units_change_places(granularity, family):
    model, (num_modules, count) = make(family), FOUND[granularity, family]
    found = find_units(model, find_targets(model, None), granularity)
    assert len(found) == num_modules and all(count in (each.count, None) for each in found)
    with torch.no_grad():
        logits = lambda: model(input_ids=torch.arange(5, 25)[None]).logits  # noqa: E731
        before = logits()
        for units in found:
            assert units.size == sum(model.get_parameter(name).numel() for name in units.bands) / units.count
            swap(model, units, list(units.bands))
            torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-4)
            for name in units.bands:  # each of the weights belongs to them
                swap(model, units, [name])
                assert (logits() - before).abs().max() > 1e-2, name
                swap(model, units, [name])


@pytest.mark.parametrize(("granularity", "family"), REFUSED)
def test_a_model_without_them_is_refused(granularity, family):
    model = make(family)
    with pytest.raises(UserError) as caught:
        find_units(model, find_targets(model, None), granularity)
    assert caught.value.where == "mask.granularity" and REFUSED[granularity, family] in str(caught.value)


def test_a_weight_that_is_no_target_is_named():
    model = make("llama")
    with pytest.raises(UserError) as caught:
        in_units(model, find_targets(model, ["gate_proj", "down_proj"]), "channel")
    assert caught.value.where == "mask.targets" and "model.layers.0.mlp.up_proj.weight" in str(caught.value)
    targets = find_targets(model, None, [1, 1])
    assert {name.split(".")[3] for name in in_units(model, targets, "channel")} == {"mlp"}
    assert {each.layer for each in find_units(model, targets, "channel")} == {1}
