"""A plan against what real ranks gather, allocate and take."""

import json

import pytest
import torch
from ranks import Ranks
from tiny import VOCABULARY, make_tokenizer

from distributed import plan_checks
from distributed.reference import make_recipe
from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.plan.dry_run import Pass, dry_run
from speft_ds.plan.gathers import GatherRules, simulate
from speft_ds.plan.geometry import read_geometry
from speft_ds.plan.memory import PROCESS, Setup, optimizer_state, total
from speft_ds.plan.plan import make_plan

LENGTH = 128  # tokens of every row
CHECKPOINTING = ["none", "reentrant", "non_reentrant"]


def make_model(folder, depth: int, width: int, dtype: str):
    """A Llama checkpoint of `depth` layers, `width` wide, and rows that are LENGTH tokens long."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY + 4 * width,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        attention_bias=True,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    row = {"prompt": "a", "response": "b" * (LENGTH - 5)}  # four tokens around the prompt, one after the row
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 16)
    return {"wide": folder, "data": folder / "rows.jsonl"}


# prefetch bucket, most live, reuse distance, persistence threshold: of elements, for layers of 38,000
RULES = {
    "no prefetch": (0, 200_000, 0, 100),
    "reuse everything": (6_000, 10**9, 10**9, 100),
    "some persistent": (50_000, 10**9, 100_000, 5_000),
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", RULES)
def test_gathers_are_deepspeeds(ranks, tmp_path, name, checkpointing):
    """Elements gathered in forward, recompute and backward, and the most that are whole: all exact."""
    bucket, live, reuse, threshold = RULES[name]
    zero = {"stage": 3, "overlap_comm": False, "stage3_prefetch_bucket_size": bucket}
    zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
    zero |= {"stage3_param_persistence_threshold": threshold}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    tiny = make_model(tmp_path / "model", 6, 64, "float32")
    train = {"steps": 4, "global_batch": 4, "micro_batch": 2, "activation_checkpointing": checkpointing}
    recipe = make_recipe(
        tiny,
        tmp_path / "run",
        "wide",
        mask={"budget": "per_layer"},  # every target has entries
        train=train,
        deepspeed={"config": str(tmp_path / "ds.json")},
    )
    got = ranks(2)(plan_checks.check_gathers, recipe=recipe)[0]
    geometry = read_geometry(recipe)
    walks = checkpointing == "reentrant"
    one = Pass(2, LENGTH, checkpointing, "entries", False, walks, 0.05, "sampled", "cpu", True)
    trace = dry_run(geometry.config, "causal_lm", "float32", list(geometry.targets), one)
    targets = frozenset(geometry.targets)
    small = frozenset(n for n, count in geometry.numel.items() if count <= threshold and n not in targets)
    rules = GatherRules(bucket, live, reuse, small, targets, is_shared=True, on_cpu=True)
    peak = simulate(trace, geometry.numel, 4, rules)
    assert peak.traffic == got["traffic"]
    assert peak.most_whole == got["most"]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": {"schedule": "grad_topk"}},
        {"mask": {"density": 0.5}},
        {"optimizer": {"name": "adamw_8bit"}, "model": {"dtype": "bfloat16"}},
        {"optimizer": {"name": "lion"}},
        {"optimizer": {"name": "sgd", "momentum": 0.9}},
        {"train": {"micro_batch": 1, "steps": 4}},
    ],
)
def test_a_run_counts_what_was_planned(ranks, tiny, tmp_path, world_size, changes):
    """Memory by kind, byte for byte, and what is sent in a step: plan and account name the same kinds."""
    sections = {"mask": {"density": 0.04, "budget": "per_layer", **changes.get("mask", {})}}
    recipe = make_recipe(tiny, tmp_path, **{**changes, **sections})
    plan = make_plan(recipe, world_size, device="cpu")
    planned = {line.kind: line.num_bytes for line in plan.memory["training"]}
    zero = load_ds_config(recipe, world_size)["zero_optimization"]
    setup = Setup(recipe, read_geometry(recipe), zero, world_size, "cpu")
    # Two maps of the 8-bit codes and their edges.
    tables = 4 * (2 * 256 + 2 * 255) if recipe.optimizer.name == "adamw_8bit" else 0
    planned["optimizer"] = sum(line.num_bytes for line in optimizer_state(setup, ""))
    for counted in ranks(world_size)(plan_checks.check_account, recipe=recipe):
        memory, planned_own = counted["memory"], setup.num_own
        # The plan spreads entries evenly over the ranks; the mask does not.
        for kind in ("index", "base values", "delta", "gradient"):
            assert memory[kind] * planned_own == planned[kind] * counted["own"], kind
        assert memory["optimizer"] == pytest.approx(planned["optimizer"], rel=0.1, abs=200 + tables)
        for kind in ("base shard", "mask", "gradient pattern"):
            assert memory[kind] == planned.get(kind, 0), kind
        assert memory["small weights, whole"] == planned.get("small weights, whole", 0)
        assert memory["gradient buckets"] == pytest.approx(planned.get("gradient buckets", 0), rel=0.1)
        assert sum(memory.values()) == plan_checks.PEAK  # the last kind is what the others leave
        sent = {line.kind: line.num_bytes for line in plan.traffic if world_size > 1}
        assert counted["sent"].pop("gradient") == pytest.approx(sent.pop("gradient", 0), rel=0.1)
        # Shards are padded to equal lengths.
        assert counted["sent"] == pytest.approx(sent, rel=0.01)


def test_the_planned_memory_is_what_a_deeper_run_takes(tmp_path, monkeypatch):
    """Measured at two depths, extrapolated to a third: within 10% of its plan, the process left out, too.

    Blocks are given back to the system as soon as they are free; as it is, the C library keeps many. A
    prefetch smaller than the model makes the gathered weights grow with the depth, as the rest does.
    """
    zero = {"stage": 3, "overlap_comm": False, "stage3_prefetch_bucket_size": 1_000_000}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    shallow, middle, deep = 2, 4, 12
    measured = {}

    def recipe_of(depth: int):
        tiny = make_model(tmp_path / f"depth{depth}", depth, 768, "bfloat16")
        return make_recipe(
            tiny,
            tmp_path / f"run{depth}",
            "wide",
            model={"dtype": "bfloat16"},
            mask={"density": 0.01, "calibration_samples": 8, "calibration_batch": 2},
            train={"steps": 2, "global_batch": 8, "micro_batch": 4},
            deepspeed={"config": str(tmp_path / "ds.json")},
        )

    for depth in (shallow, middle):
        fresh = Ranks(2)
        try:
            by_rank = fresh(plan_checks.check_memory, recipe=recipe_of(depth))
        finally:
            fresh.stop()
        measured[depth] = {phase: max(one[phase] for one in by_rank) for phase in by_rank[0]}
    by_depth = {depth: make_plan(recipe_of(depth), 2, device="cpu") for depth in (shallow, middle, deep)}
    for phase in ("scoring", "training"):
        planned = {depth: total(plan.memory[phase]) for depth, plan in by_depth.items()}
        slope = (measured[middle][phase] - measured[shallow][phase]) / (middle - shallow)
        expected = measured[shallow][phase] + slope * (deep - shallow)
        print(phase, "planned", planned, "measured", measured, "extrapolated", expected)
        assert planned[deep] == pytest.approx(expected, rel=0.1)
        net = planned[deep] - PROCESS["cpu"]
        assert net == pytest.approx(expected - PROCESS["cpu"], rel=0.1)
        assert net > PROCESS["cpu"] / 2  # a wrong plan would not pass by the process alone
