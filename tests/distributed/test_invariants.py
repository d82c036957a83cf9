"""DESIGN's invariants on real DeepSpeed ranks, each against an independent reference."""

import pytest
import torch

from distributed import checks
from distributed.reference import make_recipe, read_entries

EVERY = [(1, 2), (2, 2), (4, 2), (4, 1)]  # ranks, micro-batch
RANKS, MANY, TWO, ONE_OR_TWO = EVERY[:3], EVERY[1:3], EVERY[1:2], EVERY[:2]
BFLOAT16 = {"model": {"dtype": "bfloat16"}}


def salience(name, budget):
    return {"mask": {"salience": name, "budget": budget}}


RUNS = {  # checkpoint, sections, splits
    "untied": ("untied", {}, EVERY),
    "tied": ("tied", {}, RANKS),
    "bias": ("bias", {}, RANKS),
    "untied bfloat16": ("untied", BFLOAT16, RANKS),
    "tied bfloat16": ("tied", BFLOAT16, RANKS),
    "per_layer": ("untied", salience("gradient", "per_layer"), EVERY),
    "magnitude": ("untied", salience("magnitude", "global"), ONE_OR_TWO),
    "magnitude per_layer": ("untied", salience("magnitude", "per_layer"), ONE_OR_TWO),
    "random": ("untied", salience("random", "global"), ONE_OR_TWO),
    "random per_layer": ("untied", salience("random", "per_layer"), ONE_OR_TWO),
    "weight decay": ("untied", {"optimizer": {"weight_decay": 0.1}}, TWO),
    # 892 entries in buckets of 50 over all ranks: many, and the last one is short.
    "small buckets": ("untied", {"train": {"reduce_bucket": 50}}, MANY),
    "columns": ("untied", {"mask": {"compute": 0.3}, "train": {"sparse_backend": "columns"}}, MANY),
    "few entries": ("untied", {"mask": {"density": None, "num_trainable": 9}}, MANY),
    "one entry": ("untied", {"mask": {"density": None, "num_trainable": 1}}, MANY),
}
RUNS |= {
    "nf4": ("untied", {"model": {"base_format": "nf4"}}, EVERY),
    "bfp6": ("tied", {"model": {"base_format": "bfp6"}}, ONE_OR_TWO),
    "mxfp4 bfloat16": ("untied", {"model": {"base_format": "mxfp4", "dtype": "bfloat16"}}, RANKS),
    "nf4 columns": (
        "bias",
        {
            "model": {"base_format": "nf4"},
            "mask": {"compute": 0.3},
            "train": {"sparse_backend": "columns", "activation_checkpointing": "non_reentrant"},
        },
        TWO,
    ),
    "int8 weak columns": (
        "untied",
        {"model": {"base_format": "int8"}, "mask": {"salience": "quant_error", "granularity": "column"}},
        RANKS,
    ),
    "channels": ("untied", {"mask": {"granularity": "channel", "density": 0.1}}, EVERY),
    "heads per layer": (
        "heads",
        {"mask": {"granularity": "head", "density": 0.4, "budget": "per_layer"}},
        RANKS,
    ),
    "nf4 few entries": (
        "untied",
        {"model": {"base_format": "nf4"}, "mask": {"density": None, "num_trainable": 9}},
        MANY,
    ),
}
RUNS |= {
    f"{checkpointing} {backend}": (
        "untied",
        {"train": {"activation_checkpointing": checkpointing, "sparse_backend": backend}},
        TWO,
    )
    for checkpointing in ("reentrant", "non_reentrant")
    for backend in ("dense", "sampled")
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(ranks, tiny, tmp_path, name):
    """It is what dense autograd makes, exactly written through; base + adapter = the run; and it is one mask,
    one loss curve and one adapter over ranks x micro-batch x accumulation.
    """
    checkpoint, sections, splits = RUNS[name]
    runs, adapters = [], []
    for world_size, micro_batch in [split for split in splits if not ranks.why_not(split[0])] or splits:
        folder = tmp_path / f"{world_size}x{micro_batch}"
        train = {**sections.get("train", {}), "micro_batch": micro_batch}
        recipe = make_recipe(tiny, folder, checkpoint, **{**sections, "train": train})
        results = ranks(world_size)(checks.check_run, recipe=recipe)
        assert all(result == results[0] for result in results)
        runs.append(results[0])
        adapters.append(read_entries(folder))
        if name == "few entries":  # some weight has none, and some rank has none of some weight
            assert 0 in runs[-1]["counts"] and 0 in runs[-1]["per_weight"]
        if name == "one entry":
            assert sorted(runs[-1]["lengths"]) == [0] * (world_size - 1) + [1]
    for run, adapter in zip(runs[1:], adapters[1:], strict=True):
        for key in ("sha256", "fingerprint", "num_tokens"):
            assert run[key] == runs[0][key], key
        if "bfloat16" in name:
            continue
        assert run["loss"] == pytest.approx(runs[0]["loss"], abs=1e-5)
        assert run["grad_norm"] == pytest.approx(runs[0]["grad_norm"], rel=1e-4)
        assert adapter.keys() == adapters[0].keys()
        for weight, (index, delta) in adapter.items():
            assert torch.equal(index, adapters[0][weight][0])
            assert (delta - adapters[0][weight][1]).abs().max() <= 1e-5


@pytest.mark.parametrize("schedule", [{}, {"schedule": "drop_grow", "update_every": 2, "growth_steps": 1}])
def test_two_runs_write_the_same_bytes(ranks, tiny, tmp_path, schedule):
    """One recipe on one machine: adapter and metrics do not depend on chance."""
    made = []
    for name in ("first", "second"):
        sections = {**BFLOAT16, "mask": schedule, "train": {"reduce_bucket": 200}}
        recipe = make_recipe(tiny, tmp_path / name, **sections)
        (losses, _) = ranks(2)(checks.check_losses, recipe=recipe)
        made.append((losses, (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes()))
    assert made[0] == made[1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("base_format", [None, "nf4"])
def test_nothing_dense_survives(ranks, tiny, tmp_path, world_size, base_format):
    recipe = make_recipe(tiny, tmp_path, model={"base_format": base_format})
    ranks(world_size)(checks.check_nothing_dense, recipe=recipe)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exact_start_has_the_checkpoints_values_at_the_mask(ranks, tiny, tmp_path, world_size, dtype):
    model = {"base_format": "bfp4", "dtype": dtype}
    recipe = make_recipe(tiny, tmp_path, model=model, mask={"start": "exact"})
    ranks(world_size)(checks.check_exact_start, recipe=recipe)


@pytest.mark.parametrize("world_size", [1, 2])
def test_persistent_weights_are_not_stale(ranks, tiny, tmp_path, world_size):
    """The shipped threshold (100,000 elements) would keep every weight of this model whole."""
    ranks(world_size)(checks.check_no_stale_copy, recipe=make_recipe(tiny, tmp_path))


@pytest.mark.parametrize(
    ("of_gradient", "parts"), [(False, ["the loss is", "step 1"]), (True, ["the gradient norm nan"])]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_finite_stops_every_rank(ranks, tiny, tmp_path, world_size, of_gradient, parts):
    recipe = make_recipe(tiny, tmp_path, train={"max_nonfinite": 1})
    messages = ranks(world_size)(checks.check_nonfinite, recipe=recipe, of_gradient=of_gradient)
    assert all(part in message for message in messages for part in parts), messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_inputs_are_made_again_behind_zero3s_hooks(ranks, tiny, tmp_path, world_size, dtype):
    """Only what no frozen layer saves either way: attention's output (it does), the lowest layer's norm."""
    mask = {"budget": "per_layer"}  # every weight has entries
    recipe = make_recipe(tiny, tmp_path, model={"dtype": dtype}, mask=mask)
    lowest = [f"0.self_attn.{name}_proj.weight" for name in ("k", "o", "q", "v")]
    for saved in ranks(world_size)(checks.check_inputs_are_made_again, recipe=recipe):
        assert saved == [*lowest, "1.self_attn.o_proj.weight"]


REFUSED = {
    "no target": ({"mask": {"targets": ["c_attn"]}}, "no weight matches c_attn"),
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
    "zeros": ({"mask": {"density": 0.6, "only_nonzero": True}}, "10,710 entries are wanted, 8,922 are not"),
    "zeros of a weight": (
        {"mask": {"density": 0.6, "only_nonzero": True, "budget": "per_layer"}},
        "840 entries are wanted, 700 are not",
    ),
    "zeros of a row": (
        {"mask": {"density": 0.45, "only_nonzero": True, "budget": "per_row"}},
        "of some row of model.layers.0.self_attn.q_proj.weight",
    ),
    "no block": ({"mask": {"granularity": "block", "density": 0.01}}, "mask.granularity=block"),
    "no head": ({"mask": {"granularity": "head", "density": 0.4}}, "mask.num_trainable=3360 at least"),
    "part of a channel": ({"mask": {"granularity": "channel", "targets": ["up_proj"]}}, "0.mlp.gate_proj"),
    "long rows": ({"data": {"max_length": 8}}, "none is left: 48 too long, left out"),
    "too many rows": (
        {"data": {"select": "longest", "select_rows": 99}},
        "data.select_rows=99 is more than the 48 rows",
    ),
    "unknown task": ({"eval": {"tasks": ["nosuchtask"]}}, "lm-eval knows no task nosuchtask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_every_rank(ranks, tiny, tmp_path, name):
    sections, message = REFUSED[name]
    recipe = make_recipe(tiny, tmp_path / "run", "pruned" if "zeros" in name else "tied", **sections)
    messages = ranks(2)(checks.check_refused, recipe=recipe)
    assert all(message in text for text in messages), messages
