"""Grafts against a sort of all differences, and as adapters of the base."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.adapter.format import Adapter
from speft_ds.adapter.graft import graft
from speft_ds.model.fingerprint import fingerprint
from speft_ds.model.targets import find_targets
from unit.adapter.samples import flat, read, refused, tune, values

load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def models(tiny, tmp_path):
    """models(dtype, tied) -> folders of a base and of a model tuned from it in every weight."""

    def make(dtype=torch.float32, tied=False, coarse=False):
        base = tmp_path / f"base{tied}"
        load(tiny["tied" if tied else "untied"], dtype=dtype).save_pretrained(base)
        return str(base), tune(base, tmp_path / f"tuned{tied}", dtype, coarse)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])  # coarse: very many equal differences
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_the_largest_differences_are_taken(models, tmp_path, dtype, coarse, density):
    base, tuned = models(dtype, coarse=coarse)
    report = graft(base, tuned, tmp_path / "graft", density)
    before, after = load(base), values(load(tuned))
    differences = {n: after[n].float() - m.weight.float() for n, m in find_targets(before, None).items()}
    every = flat(differences)
    order = every.abs().argsort(descending=True, stable=True)[: round(density * len(every))]
    expected = torch.zeros_like(every)
    expected[order] = every[order]
    got = read(tmp_path / "graft")
    assert list(got) == list(differences) and torch.equal(flat(got), expected)
    assert report.num_entries == len(order) and report.num_target_elements == len(every)
    assert report.num_differing == int(every.count_nonzero())
    assert math.isclose(report.squares, float(every.detach().double().square().sum()))
    assert math.isclose(report.squares_taken, float(expected.detach().double().square().sum()))


@pytest.mark.parametrize("tied", [False, True])
def test_all_differences_make_the_tuned_weights_and_others_are_lost(models, tmp_path, tied):
    base, tuned = models(torch.bfloat16, tied=tied)
    report = graft(base, tuned, tmp_path / "graft", 1.0)
    model, after = load(base), values(load(tuned))
    before, targets = values(model), find_targets(model, None)
    rounded = fingerprint(load(base, dtype=torch.float32), torch.bfloat16)
    assert Adapter.open(tmp_path / "graft").facts["fingerprint_bfloat16"] == rounded
    speft_ds.apply_adapter(model, tmp_path / "graft")  # which accepts its own base alone
    for name in targets:
        assert torch.equal(model.get_parameter(name), after[name]), name
    assert report.num_entries == report.num_differing < report.num_target_elements
    assert math.isclose(report.squares_taken, report.squares)
    assert report.lost.keys() == before.keys() - targets.keys() and "model.norm.weight" in report.lost
    assert ("lm_head.weight" in report.lost) is not tied
    for name, lost in report.lost.items():
        difference = after[name].float() - before[name].float()
        expected = (int(difference.count_nonzero()), pytest.approx(float(difference.double().norm())))
        assert lost == expected, name


def test_targets_are_chosen_as_in_training(models, tmp_path):
    base, tuned = models()
    graft(base, tuned, tmp_path / "graft", 1.0, patterns=["q_proj", "*.1.mlp.*"])
    wanted = find_targets(load(base), ["q_proj", "*.1.mlp.*"])
    assert Adapter.open(tmp_path / "graft").names == list(wanted)
    tied = models(tied=True)
    refused(lambda: graft(*tied, tmp_path / "other", 0.1, patterns=["lm_head"]), "--target", "lm_head")
    refused(lambda: graft(*tied, tmp_path / "other", 0.1, patterns=["c_attn"]), what="c_attn")


def test_a_checkpoint_that_only_transformers_can_read(models, tmp_path, capsys):
    base, tuned = models()
    model, folder = load(tuned), tmp_path / "bin"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    graft(base, str(folder), tmp_path / "a", 0.1)
    assert f"note: {folder}" in capsys.readouterr().out
    graft(base, tuned, tmp_path / "b", 0.1)
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_what_cannot_be_grafted_is_refused(models, tiny, tmp_path):
    base, tuned = models()
    odd = [({}, "graft"), ({"density": 0.1, "num_entries": 3}, "graft")]
    odd += [({"density": 0.0}, "--density"), ({"density": 1.5}, "--density")]
    for options, where in odd:
        refused(lambda options=options: graft(base, tuned, tmp_path / "graft", **options), where)
    model = load(tuned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "inf")
    for one, other, where, what in (
        (str(tiny["bias"]), tuned, tuned, ""),  # of another architecture
        (base, base, base, ""),  # nothing differs
        (str(tmp_path), tuned, str(tmp_path), ""),  # no model
        ("no/such-model", tuned, "", "no/such-model"),
        (base, str(tmp_path / "inf"), str(tmp_path / "inf"), "layers.1.mlp.up_proj.weight"),
    ):
        refused(lambda one=one, other=other: graft(one, other, tmp_path / "graft", 0.1), where, what)
        assert not (tmp_path / "graft").exists()


def test_a_tuned_model_with_more_tokens(models, tmp_path):
    base, tuned = models()
    model = load(tuned)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "larger")
    report = graft(base, str(tmp_path / "larger"), tmp_path / "graft", 0.1)
    assert report.lost["model.embed_tokens.weight"] is None and report.num_entries
