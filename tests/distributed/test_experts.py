"""Experts in one parameter: the invariants of every other weight, also where some get no token."""

from typing import get_args

import pytest
from families import make_family

from distributed import checks
from distributed.checkpoint_checks import assert_resumed_is_uninterrupted
from distributed.method_checks import check_adapter
from distributed.reference import make_recipe
from speft_ds.config.mask_config import MaskConfig

MODELS = {  # with so many experts, some have no token in a micro-batch, or in the whole run
    "one of 16": ("mixtral", {"num_local_experts": 16, "num_experts_per_tok": 1}),
    "two of 8": ("qwen3_moe", {"num_experts": 8}),
    "transposed": ("gpt_oss", {"num_local_experts": 8}),
    "shared": ("deepseek_v3", {"n_routed_experts": 8}),
    "one by one": ("jetmoe", {"num_local_experts": 8}),
    "a stack of one": ("inkling_text", {}),  # its shared expert
}
RUNS = {  # model, sections, ranks
    **{name: (name, {}, (1, 2)) for name in MODELS},
    "sampled": ("two of 8", {"train": {"sparse_backend": "sampled"}}, (2,)),
    "dense": ("transposed", {"train": {"sparse_backend": "dense"}}, (2,)),
    "checkpointing": ("two of 8", {"train": {"activation_checkpointing": "non_reentrant"}}, (2,)),
    "blocks": ("two of 8", {"mask": {"granularity": "block", "block_size": 8}}, (2,)),
    "columns": ("transposed", {"mask": {"granularity": "column"}}, (2,)),
    "blocks over two experts": ("two of 8", {"mask": {"granularity": "block", "block_size": 7}}, (2,)),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return {name: make_family(folder / name, family, **sizes) for name, (family, sizes) in MODELS.items()}


@pytest.fixture
def recipe(tiny, models, tmp_path):
    def make(folder, name, **sections):
        sections["model"] = {"name_or_path": str(models[name]), **sections.get("model", {})}
        return make_recipe(tiny, tmp_path / folder, **sections)

    return make


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_autograd_makes(ranks, recipe, name):
    model, sections, world_sizes = RUNS[name]
    runs = [ranks(n)(checks.check_run, recipe=recipe(f"{n}", model, **sections))[0] for n in world_sizes]
    assert all(run["sha256"] == runs[0]["sha256"] for run in runs)


def test_trained_whole(ranks, recipe):
    """Live = applied = evaluated, bit for bit."""
    given = recipe("whole", "two of 8", method={"name": "full"}, train={"steps": 3})
    run = ranks(2)(check_adapter, recipe=given)[0]
    assert any("experts" in name for name in run["whole"])


@pytest.mark.parametrize("salience", get_args(MaskConfig.model_fields["salience"].annotation))
def test_a_mask_by_every_metric_is_the_same_at_every_world_size(ranks, recipe, salience):
    lift = {"lift_rank": 4} if salience == "lift" else {}
    few_bits = {"base_format": "int8"} if salience == "quant_error" else {}  # of all but the experts
    sections = {"mask": {"salience": salience, **lift}, "train": {"steps": 3}, "model": few_bits}
    (one,) = ranks(1)(checks.check_losses, recipe=recipe("1", "two of 8", **sections))
    (two, _) = ranks(2)(checks.check_losses, recipe=recipe("2", "two of 8", **sections))
    assert one["sha256"] == two["sha256"]


@pytest.mark.parametrize(
    "mask", [{}, {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5, "growth_steps": 3}]
)
def test_resumed_is_uninterrupted(ranks, recipe, mask):
    train = {"steps": 8}
    assert_resumed_is_uninterrupted(
        ranks, lambda folder: recipe(folder, "two of 8", mask=mask, train=train), 3
    )
