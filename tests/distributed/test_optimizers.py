"""Optimizers, clipping and offload in real runs: against dense autograd, and over ranks."""

import json

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from distributed import checks
from distributed.reference import (
    ADAMW_8BIT,
    LION,
    SGD,
    assert_as_dense,
    make_recipe,
    make_trainer,
    read_entries,
    start,
)
from speft_ds.config.deepspeed_config import DS_CONFIGS_DIR

PERIODIC = {"schedule": "periodic", "update_every": 4}
TOPK = {"schedule": "grad_topk", "topk_fraction": 0.3}


def check_dense(recipe):
    """The run is ordinary autograd's. On rank 0: how many groups were clipped, and were not; the losses."""
    trainer = start(recipe)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    reference = assert_as_dense(trainer, lines)
    return reference and (reference.clipped, reference.kept, reference.losses)


@pytest.mark.parametrize("optimizer", [SGD, {**SGD, "momentum": 0.0}, LION, {**LION, "betas": [0.95, 0.98]}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_dense_reference_agrees(ranks, tiny, tmp_path, world_size, optimizer):
    *_, losses = ranks(world_size)(check_dense, recipe=make_recipe(tiny, tmp_path, optimizer=optimizer))[0]
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(("clip", "clip_norm"), [("global", 1.0), ("per_layer", 0.8), ("per_component", 0.3)])
@pytest.mark.parametrize(("optimizer", "world_size"), [("adamw", 2), ("sgd", 1), ("sgd", 4)])
def test_clipping_is_that_of_dense_gradients(ranks, tiny, tmp_path, world_size, optimizer, clip, clip_norm):
    """In every mode some groups are above the norm and some below."""
    settings = {"name": optimizer, "clip": clip, "clip_norm": clip_norm}
    settings |= {"lr": 0.5} if optimizer == "sgd" else {}
    recipe = make_recipe(tiny, tmp_path, optimizer=settings)
    clipped, kept, _ = ranks(world_size)(check_dense, recipe=recipe)[0]
    assert clipped > 0 and kept > 0


SPLITS = [(1, 8), (2, 2), (4, 1)]  # ranks, micro-batch


@pytest.mark.parametrize(
    ("optimizer", "mask"),
    [(SGD, {}), (SGD, TOPK), (LION, PERIODIC), (ADAMW_8BIT, {}), (ADAMW_8BIT, PERIODIC), (ADAMW_8BIT, TOPK)],
    ids=lambda of: of.get("name") or of.get("schedule", "static"),
)
def test_world_size_and_split_are_no_input(ranks, tiny, tmp_path, optimizer, mask):
    """Equal to the order of sums; 8 bits are rounded in blocks, which depend on the ranks."""
    runs, adapters = [], []
    for world_size, micro_batch in SPLITS:
        folder = tmp_path / str(world_size)
        train = {"steps": 9, "micro_batch": micro_batch}
        recipe = make_recipe(tiny, folder, mask=mask, optimizer=optimizer, train=train)
        runs.append(ranks(world_size)(checks.check_losses, recipe=recipe)[0])
        adapters.append(read_entries(folder))
    is_rounded = optimizer is ADAMW_8BIT
    for run, adapter in zip(runs[1:], adapters[1:], strict=True):
        assert run["loss"] == pytest.approx(runs[0]["loss"], abs=3e-3 if is_rounded else 1e-5)
        if is_rounded and mask == PERIODIC:
            continue  # scored on weights that differ, the masks may, too
        assert run["sha256"] == runs[0]["sha256"]
        pairs = [(adapter[name][1], adapters[0][name][1]) for name in adapter]
        moved = torch.cat([other for _, other in pairs]).abs().mean()
        away = torch.cat([one - other for one, other in pairs]).abs().mean()
        assert away < (0.03 if is_rounded else 1e-4) * moved


def check_offloaded(recipe):
    """As `check_run`, where the shards are kept by DeepSpeed's offload."""
    assert make_trainer(recipe).engine.optimizer.offload.offload_device == OffloadDeviceEnum.cpu, "not there"
    return checks.check_run(recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_changes_no_bit(ranks, tiny, tmp_path, dtype):
    """The shipped file and the same without `offload_param`."""
    config = json.loads((DS_CONFIGS_DIR / "zero3_bf16_offload.json").read_text())
    del config["zero_optimization"]["offload_param"]
    (tmp_path / "plain.json").write_text(json.dumps(config))

    def recipe_of(name, config):
        sections = {"model": {"dtype": dtype}, "deepspeed": {"config": config}}
        return make_recipe(tiny, tmp_path / name, **sections)

    offloaded = ranks(2)(check_offloaded, recipe=recipe_of("offloaded", "zero3_bf16_offload"))
    assert offloaded == ranks(2)(checks.check_run, recipe=recipe_of("plain", str(tmp_path / "plain.json")))
    adapters = [read_entries(tmp_path / name) for name in ("offloaded", "plain")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, (index, delta) in adapters[0].items():
        assert torch.equal(index, adapters[1][name][0]) and torch.equal(delta, adapters[1][name][1])
    assert any(delta.any() for _, delta in adapters[0].values())
