"""LoRA, rsLoRA, PiSSA, DoRA, and a mask with low-rank matrices: against stock PEFT and torch's AdamW."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distributed.checkpoint_checks import assert_resumed_is_uninterrupted, run_piece
from distributed.low_rank_checks import check_against_peft, train_and_look
from distributed.reference import make_recipe
from speft_ds.adapter.apply import apply_adapter, remove_adapter
from speft_ds.adapter.merge import merge

METHODS = {name: {"method": {"name": name, "rank": 3}} for name in ("lora", "rslora", "pissa", "dora")}
METHODS["sparse_lora"] = {"method": {"name": "sparse_lora", "lora_share": 0.6}, "mask": {"density": 0.2}}


@pytest.fixture
def recipe(tiny, tmp_path):
    def make(name, output_dir="run", checkpoint="untied", **sections):
        # A larger eps: a gradient near 0 would have AdamW make a step of its rounding.
        sections = {**METHODS[name], "train": {"steps": 10}, **sections}
        sections["optimizer"] = {"eps": 1e-5, "weight_decay": 0.1}
        return make_recipe(tiny, tmp_path / output_dir, checkpoint, **sections)

    return make


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, 2) for name in METHODS] + [(n, size) for n in ("lora", "dora", "sparse_lora") for size in (1, 4)],
)
def test_ten_steps_equal_peft(ranks, recipe, name, world_size):
    run = ranks(world_size)(check_against_peft, recipe=recipe(name))[0]
    assert run["parts"] == {"A", "B"} | ({"magnitude_vector"} if name == "dora" else set())
    assert run["trained"] == run["entries"] + run["low_rank"]
    if name == "sparse_lora":  # one budget
        assert run["trained"] == round(0.2 * run["targets"])
        assert 0.4 * run["trained"] < run["low_rank"] <= 0.6 * run["trained"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora", "reentrant"),
        ("lora", "non_reentrant"),
        ("dora", "reentrant"),
        ("sparse_lora", "non_reentrant"),
    ],
)
def test_checkpointed_activations(ranks, recipe, name, kind):
    train = {"steps": 4, "activation_checkpointing": kind, "micro_batch": 1}
    ranks(2)(check_against_peft, recipe=recipe(name, checkpoint="bias", train=train))


def load(folder, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_the_live_model(ranks, recipe, name, dtype, tiny, tmp_path):
    """Read by stock PEFT, applied, merged; and taken off again, bit for bit."""
    given = recipe(name, model={"dtype": dtype})
    run = ranks(2)(train_and_look, recipe=given)[0]
    live, ids, adapter = run["logits"], run["ids"], f"{given.output_dir}/adapter"
    base = load(tiny["untied"], dtype)
    before = {key: weight.clone() for key, weight in base.named_parameters()}
    moved = (live - logits_of(base, ids)).abs().max()
    close = 1e-4 if dtype == "float32" else 0.1 * moved
    assert run["losses"][-1] < run["losses"][0] and moved > 0.3
    assert run["dtypes"] == {getattr(torch, dtype)}

    apply_adapter(base, adapter)
    applied = {key: weight.clone() for key, weight in base.named_parameters()}
    assert torch.allclose(logits_of(base, ids), live, atol=close)
    for key, weight in run["evaluated"].items():
        assert torch.equal(weight, applied[key]), key
    merge(None, given.output_dir, tmp_path / "merged")
    for key, weight in load(tmp_path / "merged", dtype).named_parameters():
        assert torch.equal(weight, applied[key]), key
    remove_adapter(base)
    assert all(torch.equal(weight, before[key]) for key, weight in base.named_parameters())

    if name != "sparse_lora":
        stock = PeftModel.from_pretrained(base, adapter)
        assert torch.allclose(logits_of(stock, ids), live, atol=close)
        for key, weight in stock.merge_and_unload().named_parameters():
            difference = (weight.float() - applied[key].float()).abs()
            assert (difference <= (1e-6 if dtype == "float32" else 2**-7 * weight.abs().float())).all(), key


def test_half_a_merge_is_half_way(ranks, recipe, tiny, tmp_path):
    given = recipe("sparse_lora")
    ranks(1)(train_and_look, recipe=given)
    for alpha in (0.0, 0.5, 1.0):
        merge(None, given.output_dir, tmp_path / f"{alpha}", alpha)
    none, half, all_of_it = (dict(load(tmp_path / f"{a}").named_parameters()) for a in (0.0, 0.5, 1.0))
    for key, weight in load(tiny["untied"]).named_parameters():
        assert torch.equal(none[key], weight), key
        assert torch.allclose(half[key], (weight + all_of_it[key]) / 2, atol=1e-6), key


@pytest.mark.parametrize("name", ["pissa", "dora", "sparse_lora"])
def test_resumed_is_uninterrupted(ranks, recipe, name):
    assert_resumed_is_uninterrupted(ranks, lambda folder: recipe(name, folder, train={"steps": 6}), stop=4)


def test_any_number_of_ranks_goes_on(ranks, recipe):
    """1 -> 2 -> 4 ranks: the losses of an undisturbed run."""
    for name in ("pissa", "sparse_lora"):
        given = {"train": {"steps": 6}}
        whole = ranks(2)(run_piece, recipe=recipe(name, f"{name} whole", **given), stop=6)[0]
        checkpoint, losses = None, []
        for world_size, stop in ((1, 2), (2, 3), (4, 6)):
            arguments = {"recipe": recipe(name, f"{name} {stop}", **given), "stop": stop}
            piece = ranks(world_size)(run_piece, **arguments, checkpoint=checkpoint)[0]
            checkpoint, losses = piece["checkpoint"], losses + piece["losses"]
        assert losses == pytest.approx(whole["losses"], abs=1e-5)
