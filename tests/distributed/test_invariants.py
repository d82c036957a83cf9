"""DESIGN's invariants on real DeepSpeed ranks, each against an independent reference."""

import pytest
import torch

from distributed import checks
from distributed.reference import make_recipe, read_entries

TARGET_SPLITS = [(1, 2), (2, 2), (4, 1), (4, 2)]


@pytest.mark.parametrize("checkpoint", ["untied", "tied", "bias"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dense_reference_agrees(ranks, tiny, tmp_path, world_size, checkpoint):
    ranks(world_size)(checks.check_dense_reference, recipe=make_recipe(tiny, tmp_path, checkpoint))


@pytest.mark.parametrize("reentrant", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("backend", ["dense", "sampled"])
def test_dense_reference_agrees_with_checkpointing(ranks, tiny, tmp_path, reentrant, backend):
    train = {"activation_checkpointing": reentrant, "sparse_backend": backend}
    recipe = make_recipe(tiny, tmp_path, train=train)
    ranks(2)(checks.check_dense_reference, recipe=recipe)


def test_weight_decay_and_schedule_agree_with_the_reference(ranks, tiny, tmp_path):
    recipe = make_recipe(tiny, tmp_path, optimizer={"weight_decay": 0.1})
    ranks(2)(checks.check_dense_reference, recipe=recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_write_through_is_exact(ranks, tiny, tmp_path, world_size, checkpoint, dtype):
    recipe = make_recipe(tiny, tmp_path, checkpoint, model={"dtype": dtype})
    ranks(world_size)(checks.check_write_through, recipe=recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", ["untied", "tied"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_adapter_is_the_run(ranks, tiny, tmp_path, world_size, checkpoint, dtype):
    recipe = make_recipe(tiny, tmp_path, checkpoint, model={"dtype": dtype})
    ranks(world_size)(checks.check_adapter, recipe=recipe)


@pytest.mark.parametrize("salience", ["gradient", "magnitude", "random"])
@pytest.mark.parametrize("budget", ["global", "per_layer"])
def test_world_size_and_split_are_no_input(ranks, tiny, tmp_path, salience, budget):
    """One mask, one loss curve, one adapter over ranks x micro-batch x accumulation."""
    runs, adapters = [], []
    for world_size, micro_batch in TARGET_SPLITS if salience == "gradient" else TARGET_SPLITS[:2]:
        folder = tmp_path / f"{world_size}x{micro_batch}"
        recipe = make_recipe(
            tiny,
            folder,
            mask={"salience": salience, "budget": budget},
            train={"micro_batch": micro_batch},
        )
        results = ranks(world_size)(checks.check_losses, recipe=recipe)
        assert all(result == results[0] for result in results)
        runs.append(results[0])
        adapters.append(read_entries(folder))
    for run, adapter in zip(runs[1:], adapters[1:], strict=True):
        assert run["sha256"] == runs[0]["sha256"]
        assert run["fingerprint"] == runs[0]["fingerprint"]
        assert run["num_tokens"] == runs[0]["num_tokens"]
        assert run["losses"] == pytest.approx(runs[0]["losses"], abs=1e-5)
        assert run["grad_norms"] == pytest.approx(runs[0]["grad_norms"], rel=1e-4)
        assert adapter.keys() == adapters[0].keys()
        for name, (index, delta) in adapter.items():
            assert torch.equal(index, adapters[0][name][0])
            assert (delta - adapters[0][name][1]).abs().max() <= 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nothing_dense_survives(ranks, tiny, tmp_path, world_size):
    ranks(world_size)(checks.check_nothing_dense, recipe=make_recipe(tiny, tmp_path))


@pytest.mark.parametrize("world_size", [1, 2])
def test_persistent_weights_are_not_stale(ranks, tiny, tmp_path, world_size):
    """The shipped threshold (100,000 elements) would keep every weight of this model whole."""
    ranks(world_size)(checks.check_no_stale_copy, recipe=make_recipe(tiny, tmp_path))


@pytest.mark.parametrize("world_size", [2, 4])
def test_empty_slices(ranks, tiny, tmp_path, world_size):
    recipe = make_recipe(tiny, tmp_path, mask={"density": None, "num_trainable": 9})
    ranks(world_size)(checks.check_empty_slices, recipe=recipe)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_without_any_entry(ranks, tiny, tmp_path, world_size):
    recipe = make_recipe(tiny, tmp_path, mask={"density": None, "num_trainable": 1})
    lengths = ranks(world_size)(checks.check_ranks_without_entries, recipe=recipe)[0]
    assert sorted(lengths) == [0] * (world_size - 1) + [1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_small_reduce_buckets(ranks, tiny, tmp_path, world_size):
    """892 entries in buckets of 50 over all ranks: many, and the last one is short."""
    recipe = make_recipe(tiny, tmp_path, train={"reduce_bucket": 50})
    ranks(world_size)(checks.check_dense_reference, recipe=recipe)


def test_bf16_mask_is_the_same_at_every_world_size(ranks, tiny, tmp_path):
    masks = set()
    for world_size in (1, 2, 4):
        recipe = make_recipe(tiny, tmp_path / str(world_size), model={"dtype": "bfloat16"})
        masks |= {result["sha256"] for result in ranks(world_size)(checks.check_losses, recipe=recipe)}
    assert len(masks) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_nonfinite_loss_stops_every_rank(ranks, tiny, tmp_path, world_size):
    recipe = make_recipe(tiny, tmp_path, train={"max_nonfinite": 1})
    messages = ranks(world_size)(checks.check_nonfinite, recipe=recipe)
    assert all("the loss is" in message and "step 1" in message for message in messages)


@pytest.mark.parametrize("world_size", [1, 2])
def test_nonfinite_gradient_stops_every_rank(ranks, tiny, tmp_path, world_size):
    recipe = make_recipe(tiny, tmp_path, train={"max_nonfinite": 1})
    messages = ranks(world_size)(checks.check_nonfinite_gradient, recipe=recipe)
    assert all("the gradient norm nan" in message for message in messages)


REFUSED = {
    "no target": ({"mask": {"targets": ["c_attn"]}}, "no linear layer matches c_attn"),
    "tied target": ({"mask": {"targets": ["lm_head"]}}, "shares its weight"),
    "too many entries": ({"mask": {"density": None, "num_trainable": 10**6}}, "1,000,000 entries"),
    "too few samples": ({"mask": {"calibration_samples": 49}}, "mask.calibration_samples=48"),
    "warm-up": ({"train": {"steps": None, "epochs": 0.1}, "optimizer": {"warmup_steps": 9}}, "warm-up steps"),
    "layers": (
        {"mask": {"layers": [1, 2]}},
        "layers 1 to 2 are asked for; the targets are in layers: 0 to 1",
    ),
    "layers of the head": ({"mask": {"targets": ["lm_head"], "layers": [0, 1]}}, "are in layers: none"),
    "rank of lift": ({"mask": {"salience": "lift", "lift_rank": 8}}, "of rank 8 leaves a weight with 8 rows"),
    "no entry": (
        {"mask": {"density": 1e-5}},
        "density 1e-05 comes to 0 entries, too few to give a single tile",
    ),
    "no entry of a layer": (
        {"mask": {"budget": "per_layer", "density": 1e-4}},
        "to give every layer anything",
    ),
    "no entry of a row": ({"mask": {"budget": "per_row", "density": 1e-2}}, "to give every row anything"),
    "no block": ({"mask": {"granularity": "block", "density": 0.01}}, "mask.granularity=block"),
    "long rows": ({"data": {"max_length": 8}}, "none is left: 48 too long, left out"),
    "unknown task": ({"eval": {"tasks": ["nosuchtask"]}}, "no task nosuchtask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_every_rank(ranks, tiny, tmp_path, name):
    sections, message = REFUSED[name]
    recipe = make_recipe(tiny, tmp_path / "run", "tied", **sections)
    messages = ranks(2)(checks.check_refused, recipe=recipe)
    assert all(message in text for text in messages), messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_inputs_are_made_again_behind_zero3s_hooks(ranks, tiny, tmp_path, world_size, dtype):
    """Only what no frozen layer saves either way: attention's output (it does), the lowest layer's norm."""
    mask = {"budget": "per_layer"}  # every weight has entries
    recipe = make_recipe(tiny, tmp_path, model={"dtype": dtype}, mask=mask)
    lowest = [f"0.self_attn.{name}_proj.weight" for name in ("k", "o", "q", "v")]
    for saved in ranks(world_size)(checks.check_inputs_are_made_again, recipe=recipe):
        assert saved == [*lowest, "1.self_attn.o_proj.weight"]


@pytest.mark.parametrize("schedule", [{}, {"schedule": "drop_grow", "update_every": 2, "growth_steps": 1}])
def test_two_runs_write_the_same_bytes(ranks, tiny, tmp_path, schedule):
    """One recipe on one machine: adapter and metrics do not depend on chance."""
    adapters = []
    for name in ("first", "second"):
        recipe = make_recipe(
            tiny, tmp_path / name, model={"dtype": "bfloat16"}, mask=schedule, train={"reduce_bucket": 200}
        )
        ranks(2)(checks.check_losses, recipe=recipe)
        adapters.append((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
