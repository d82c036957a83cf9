"""Weights that are trained whole, beside a mask and without one: against plain autograd and torch's AdamW."""

import pytest
import torch

from distributed.method_checks import DenseMethod
from distributed.reference import assert_as_dense, make_recipe, start, whole_weights

DENSE = ["embed_tokens", "lm_head", "*layernorm", "norm", "o_proj"]


def check_against_autograd(recipe):
    trainer = start(recipe)
    before = whole_weights(trainer.engine.module)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    assert_as_dense(trainer, lines, DenseMethod)
    after = whole_weights(trainer.engine.module)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    return moved, set(trainer.context.whole), trainer.mask.num_trainable


@pytest.fixture
def recipe(tiny, tmp_path):
    def make(output_dir="run", checkpoint="untied", **sections):
        # A larger eps: a gradient near 0 would have AdamW make a step of its rounding.
        sections["optimizer"] = {"eps": 1e-5, "weight_decay": 0.1, **sections.get("optimizer", {})}
        return make_recipe(tiny, tmp_path / output_dir, checkpoint, **sections)

    return make


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_whole_weights_beside_a_mask_equal_autograd(ranks, recipe, world_size):
    given = recipe(mask={"dense": DENSE})
    moved, whole, num_entries = ranks(world_size)(check_against_autograd, recipe=given)[0]
    assert whole < moved and num_entries > 0
    assert {name.split(".")[-2] for name in whole} == {
        "embed_tokens",
        "lm_head",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "o_proj",
    }


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_full_fine_tuning_equals_autograd(ranks, recipe, checkpoint, checkpointing):
    train = {"activation_checkpointing": checkpointing, "micro_batch": 1}
    given = recipe(checkpoint=checkpoint, method={"name": "full"}, train=train)
    moved, whole, num_entries = ranks(2)(check_against_autograd, recipe=given)[0]
    assert moved == whole and num_entries == 0
    assert ("lm_head.weight" in whole) == (checkpoint == "untied")
