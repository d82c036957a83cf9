"""Weights that are trained whole, beside a mask and without one: against plain autograd and torch's AdamW."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import checks
from distributed.checkpoint_checks import assert_resumed_is_uninterrupted, contents, run_piece
from distributed.method_checks import check_adapter, check_against_autograd
from distributed.reference import make_recipe
from speft_ds.adapter.apply import apply_adapter, remove_adapter
from speft_ds.adapter.merge import merge

DENSE = ["embed_tokens", "lm_head", "*layernorm", "norm", "o_proj"]
LISA = {"method": {"name": "lisa", "layers": 1, "every": 2}}
HALF = {"method": {"name": "half", "every": 2}}


@pytest.fixture
def recipe(tiny, tmp_path):
    def make(output_dir="run", checkpoint="untied", **sections):
        # A larger eps: a gradient near 0 would have AdamW make a step of its rounding.
        sections["optimizer"] = {"eps": 1e-5, "weight_decay": 0.1, **sections.get("optimizer", {})}
        return make_recipe(tiny, tmp_path / output_dir, checkpoint, **sections)

    return make


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_whole_weights_beside_a_mask_equal_autograd(ranks, recipe, world_size):
    run = ranks(world_size)(check_against_autograd, recipe=recipe(mask={"dense": DENSE}))[0]
    assert run["whole"] < run["moved"] and run["num_entries"] > 0
    kinds = {name.split(".")[-2] for name in run["whole"]}
    assert kinds == {
        "embed_tokens",
        "lm_head",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "o_proj",
    }


def test_whole_weights_beside_a_base_in_few_bits(ranks, recipe):
    given = recipe(mask={"dense": ["embed_tokens", "*layernorm"]}, model={"base_format": "nf4"})
    run = ranks(2)(check_against_autograd, recipe=given)[0]
    assert len(run["whole"]) == 5 and run["whole"] < run["moved"]


def test_biases_are_trained_with_their_weights(ranks, recipe):
    given = recipe(checkpoint="bias", mask={"dense": ["*.bias", "q_proj"]})
    run = ranks(2)(check_against_autograd, recipe=given)[0]
    assert any(name.endswith(".bias") for name in run["whole"]) and run["whole"] < run["moved"]


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_full_fine_tuning_equals_autograd(ranks, recipe, checkpoint, checkpointing):
    train = {"activation_checkpointing": checkpointing, "micro_batch": 1}
    given = recipe(checkpoint=checkpoint, method={"name": "full"}, train=train)
    run = ranks(2)(check_against_autograd, recipe=given)[0]
    assert run["moved"] == run["whole"] and run["num_entries"] == 0
    assert ("lm_head.weight" in run["whole"]) == (checkpoint == "untied")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("method", [LISA, HALF], ids=["lisa", "half"])
def test_sampled_weights_equal_a_plain_loop(ranks, recipe, method, world_size):
    run = ranks(world_size)(check_against_autograd, recipe=recipe(**method, train={"steps": 6}))[0]
    opened = run["open"]
    assert opened[0] == opened[1] and len({frozenset(names) for names in opened}) > 1
    assert run["moved"] == set().union(*opened)
    if method is LISA:
        always = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
        assert always == set.intersection(*opened)


ADAPTERS = {
    "dense": {"mask": {"dense": DENSE}},
    "dense periodic": {"mask": {"dense": DENSE, "schedule": "periodic", "update_every": 2}},
    "dense drop_grow": {
        "mask": {"dense": DENSE, "schedule": "drop_grow", "update_every": 2, "growth_steps": 1}
    },
    "full": {"method": {"name": "full"}},
    "lisa": LISA,
    "half": HALF,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_live_is_applied_is_merged(ranks, recipe, name, dtype, tiny, tmp_path):
    given = recipe(**ADAPTERS[name], model={"dtype": dtype})
    run = ranks(2)(check_adapter, recipe=given)[0]
    assert run["whole"] and (run["num_entries"] > 0) == name.startswith("dense")
    base = AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=getattr(torch, dtype))
    before = {key: weight.clone() for key, weight in base.named_parameters()}
    merge(None, given.output_dir, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype))
    apply_adapter(base, f"{given.output_dir}/adapter")
    for (key, one), other in zip(base.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(one, other), key
    remove_adapter(base)
    assert all(torch.equal(weight, before[key]) for key, weight in base.named_parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_resumed_is_uninterrupted(ranks, recipe, name):
    def recipe_of(folder):
        return recipe(folder, **ADAPTERS[name], train={"steps": 8})

    assert_resumed_is_uninterrupted(ranks, recipe_of, stop=5)


def test_any_number_of_ranks_goes_on(ranks, recipe):
    """1 -> 2 -> 4 ranks: the losses of an undisturbed run."""
    for name in ("dense", "lisa"):
        given = {**ADAPTERS[name], "train": {"steps": 6}}
        whole = ranks(2)(run_piece, recipe=recipe(f"{name} whole", **given), stop=6)[0]
        checkpoint, losses = None, []
        for world_size, stop in ((1, 2), (2, 3), (4, 6)):
            arguments = {"recipe": recipe(f"{name} {stop}", **given), "stop": stop, "checkpoint": checkpoint}
            piece = ranks(world_size)(run_piece, **arguments)[0]
            checkpoint, losses = piece["checkpoint"], losses + piece["losses"]
        assert losses == pytest.approx(whole["losses"], abs=1e-5)
        assert contents(checkpoint).keys() == contents(whole["checkpoint"]).keys()


REFUSED = {  # checkpoint, sections, what the message has to name
    "a target, too": (
        "untied",
        {"mask": {"dense": ["q_proj"], "targets": ["q_proj", "k_proj"]}},
        "mask.targets",
    ),
    "a tied head alone": ("tied", {"mask": {"dense": ["lm_head"]}}, "embed_tokens"),
    "all layers": ("untied", {"method": {"name": "lisa", "layers": 2}}, "method.layers=1"),
    "nothing": ("untied", {"mask": {"dense": ["c_attn"]}}, "embed_tokens"),
    "few bits": (
        "untied",
        {"mask": {"dense": ["q_proj"]}, "model": {"base_format": "nf4"}},
        "model.base_format=null",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_every_rank(ranks, recipe, name):
    checkpoint, sections, named = REFUSED[name]
    for message in ranks(2)(checks.check_refused, recipe=recipe(checkpoint=checkpoint, **sections)):
        assert ("mask.dense" in message or "method" in sections) and named in message, message
