"""Grafts against a sort of all differences, and as adapters of the base."""

import math

import pytest
import torch
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.targets import find_targets
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import speft_ds
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.graft import graft
from speft_ds.errors import UserError
from unit.test_adapter_tools.made import read


def load(folder, dtype=None):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(dtype, tied) -> folders of a base and of a model tuned from it in every weight, made once."""
    made = {}

    def make(dtype=torch.float32, tied=False, coarse=False):
        if (dtype, tied, coarse) in made:
            return made[dtype, tied, coarse]
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype)
        folder = tmp_path_factory.mktemp("models")
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                step = torch.randn(parameter.shape) * 0.02
                parameter += ((step * 100).round() / 128 if coarse else step).to(dtype)
        model.save_pretrained(folder / "tuned", max_shard_size="10KB")  # several files
        made[dtype, tied, coarse] = (str(folder / "base"), str(folder / "tuned"))
        return made[dtype, tied, coarse]

    return make


def differences(base, tuned, patterns=None):
    """Target name -> fp32 difference, and all of them joined, in model order."""
    before, after = load(base), dict(load(tuned).named_parameters())
    targets = find_targets(before, patterns)
    apart = {n: (after[n].float() - m.weight.float()).detach() for n, m in targets.items()}
    return apart, torch.cat([values.reshape(-1) for values in apart.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])  # coarse: very many equal differences
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_the_largest_differences_are_taken(models, tmp_path, dtype, coarse, density):
    base, tuned = models(dtype, coarse=coarse)
    report = graft(base, tuned, tmp_path / "graft", density)
    apart, values = differences(base, tuned)
    order = values.abs().argsort(descending=True, stable=True)[: round(density * len(values))]
    expected = torch.zeros_like(values)
    expected[order] = values[order]
    got = read(tmp_path / "graft")
    assert list(got) == list(apart)
    assert torch.equal(torch.cat([delta.reshape(-1) for delta in got.values()]), expected)
    assert report.num_entries == len(order) and report.num_target_elements == len(values)
    assert report.num_differing == int(values.count_nonzero())
    assert math.isclose(report.squares, float(values.double().square().sum()))
    assert math.isclose(report.squares_taken, float(expected.double().square().sum()))


def test_it_is_an_adapter_of_the_base(models, tmp_path):
    base, tuned = models(torch.bfloat16)
    graft(base, tuned, tmp_path / "graft", num_entries=500)
    facts = Adapter.open(tmp_path / "graft").facts
    model = load(base)
    assert facts["fingerprint"] == fingerprint(model) and facts["dtype"] == "bfloat16"
    assert facts["fingerprint_bfloat16"] == fingerprint(load(base, torch.float32), torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    speft_ds.apply_adapter(model, tmp_path / "graft")
    after, deltas = dict(load(tuned).named_parameters()), read(tmp_path / "graft")
    for name, weight in model.named_parameters():
        chosen = deltas.get(name, torch.zeros(())) != 0
        assert torch.equal(weight, torch.where(chosen, after[name], before[name])), name


def test_all_differences_make_the_tuned_weights(models, tmp_path):
    base, tuned = models(torch.bfloat16, tied=True)
    report = graft(base, tuned, tmp_path / "graft", 1.0)
    model, after = load(base), load(tuned)
    speft_ds.apply_adapter(model, tmp_path / "graft")
    for name in find_targets(after, None):
        assert torch.equal(model.get_parameter(name), after.get_parameter(name)), name
    assert report.num_entries == report.num_differing < report.num_target_elements
    assert math.isclose(report.squares_taken, report.squares)


@pytest.mark.parametrize("tied", [False, True])
def test_what_an_adapter_cannot_hold_is_said(models, tmp_path, tied):
    base, tuned = models(tied=tied)
    report = graft(base, tuned, tmp_path / "graft", num_entries=9)
    before, after = load(base), dict(load(tuned).named_parameters())
    others = {n: w for n, w in before.named_parameters() if n not in find_targets(before, None)}
    assert report.lost.keys() == others.keys() and "model.norm.weight" in others
    assert ("lm_head.weight" in others) is not tied
    for name, weight in others.items():
        apart = (after[name] - weight).detach()
        assert report.lost[name] == (int(apart.count_nonzero()), pytest.approx(float(apart.double().norm())))


def test_targets_are_chosen_as_in_training(models, tmp_path):
    base, tuned = models()
    graft(base, tuned, tmp_path / "graft", 1.0, patterns=["q_proj", "*.1.mlp.*"])
    wanted = find_targets(load(base), ["q_proj", "*.1.mlp.*"])
    assert Adapter.open(tmp_path / "graft").names == list(wanted)
    tied = models(tied=True)
    with pytest.raises(UserError, match="shares its weight"):
        graft(*tied, tmp_path / "other", 0.1, patterns=["lm_head"])
    with pytest.raises(UserError, match="no linear layer matches c_attn"):
        graft(*tied, tmp_path / "other", 0.1, patterns=["c_attn"])


def test_a_checkpoint_that_only_transformers_can_read(models, tmp_path, capsys):
    base, tuned = models()
    model = load(tuned)
    folder = tmp_path / "bin"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    graft(base, str(folder), tmp_path / "a", 0.1)
    assert "is loaded whole: its weights are not in safetensors files" in capsys.readouterr().out
    graft(base, tuned, tmp_path / "b", 0.1)
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either --density or --num-entries"),
        ({"density": 0.1, "num_entries": 3}, "either --density or --num-entries"),
        ({"density": 0.0}, "--density is 0.0"),
        ({"density": 1.5}, "--density is 1.5"),
    ],
)
def test_how_many_must_be_said_once(models, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        graft(*models(), tmp_path / "graft", **options)


def test_models_that_do_not_fit_are_refused(models, tiny, tmp_path):
    base, tuned = models()
    for one, other, said in (
        (base, str(tiny["untied"]), "different architectures"),
        (base, base, "nothing to graft"),
        (str(tmp_path), tuned, "cannot read the model"),
        ("no/such-model", tuned, "no/such-model"),
    ):
        with pytest.raises(UserError, match=said):
            graft(one, other, tmp_path / "graft", 0.1)
        assert not (tmp_path / "graft").exists()


def test_a_tuned_model_with_more_tokens(models, tmp_path):
    base, tuned = models()
    model = load(tuned)
    model.resize_token_embeddings(44)
    model.save_pretrained(tmp_path / "larger")
    report = graft(base, str(tmp_path / "larger"), tmp_path / "graft", 0.1)
    assert report.lost["model.embed_tokens.weight"] is None and report.num_entries


def test_weights_that_are_not_finite_are_refused(models, tmp_path):
    base, tuned = models()
    model = load(tuned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "inf")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight is not finite"):
        graft(base, str(tmp_path / "inf"), tmp_path / "graft", 0.1)
