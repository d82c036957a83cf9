"""A plan's arithmetic, by hand for a tiny model; what it says, and to whom."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny import make_model

from speft_ds.config.recipe import Recipe
from speft_ds.errors import RecipeError
from speft_ds.plan.dry_run import LiveBytes, Pass, dry_run
from speft_ds.plan.gathers import GatherRules, Moment, Trace, simulate
from speft_ds.plan.geometry import read_geometry
from speft_ds.plan.memory import GIB, PROCESS, Line, total
from speft_ds.plan.plan import Plan, make_plan, print_plan

# tiny.make_model: 35 wide, 53 in the MLP, 5 heads of 8 (1 key and value head), 2 layers, vocabulary 260.
LAYER = {
    "q": 40 * 35,
    "k": 8 * 35,
    "v": 8 * 35,
    "o": 35 * 40,
    "gate": 53 * 35,
    "up": 53 * 35,
    "down": 35 * 53,
}
TARGETS = 2 * sum(LAYER.values())
NORMS = 5 * 35
EMBEDDINGS = 2 * 260 * 35


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model, tmp_path):
    """A function: sections that differ -> a recipe."""

    def make(**sections) -> Recipe:
        values = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 16},
            "mask": {"num_trainable": 301},
            "train": {"global_batch": 12, "micro_batch": 2, "epochs": 3.0},
            "deepspeed": {"config": "zero3_cpu"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return Recipe.model_validate(values)

    return make


def sizes(lines: list[Line]) -> dict[str, int]:
    return {line.kind: line.num_bytes for line in lines}


def test_state_and_shards_by_hand(recipe):
    got = sizes(make_plan(recipe(), 3, device="cpu").memory["training"])
    shapes = [*LAYER.values()] * 2 + [35] * 5 + [260 * 35] * 2
    assert sum(shapes) == TARGETS + NORMS + EMBEDDINGS
    assert got["process"] == PROCESS["cpu"]
    assert got["base shard"] == 4 * sum(-(-numel // 3) for numel in shapes)
    # All but the targets are below the threshold of 100,000 elements, and stay whole.
    assert got["small weights, whole"] == 4 * (NORMS + EMBEDDINGS)
    assert got["mask"] == 4 * 301
    own = 101  # 301 / 3, rounded up
    assert (got["gradient"], got["gradient buckets"]) == (4 * own, 4 * 301)
    assert (got["index"], got["base values"], got["delta"]) == (4 * own, 4 * own, 4 * own)
    assert got["Adam moments"] == 8 * own
    rows = 2 * (40 + 8 + 8 + 35 + 53 + 53 + 35)
    assert got["gradient pattern"] == 301 * 8 + 4 * (rows + 14)
    assert "entry_steps" not in got


def test_bfloat16_halves_the_base_and_its_values_only(recipe):
    wide = sizes(make_plan(recipe(), 2, device="cpu").memory["training"])
    short = sizes(make_plan(recipe(model={"dtype": "bfloat16"}), 2, device="cpu").memory["training"])
    halved = {"base shard", "small weights, whole", "base values", "gathered weights"}
    assert all(2 * short[kind] == wide[kind] for kind in halved)
    counted = {*halved, "activations"}
    assert all(short[kind] == wide[kind] for kind in wide.keys() - counted)


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_dtype_left_to_the_hardware_is_planned_for_the_device(recipe, monkeypatch, multiplies):
    monkeypatch.setattr("speft_ds.dtype.multiplies_bfloat16", lambda device: multiplies)
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16" if multiplies else "float32")):
        plan = make_plan(recipe(model={"dtype": "auto"}), 2, device=device)
        (noted,) = [note for note in plan.notes if "model.dtype=auto" in note]
        expected = make_plan(recipe(model={"dtype": dtype}), 2, device=device)
        assert dtype in noted and plan.memory == expected.memory and plan.traffic == expected.traffic


@pytest.mark.parametrize(
    ("salience", "sets"), [("gradient", 1), ("snip", 2), ("magnitude", 1), ("synflow", 2), ("grasp", 4)]
)
def test_scores_by_hand(recipe, salience, sets):
    lines = sizes(make_plan(recipe(mask={"salience": salience}), 3, device="cpu").memory["scoring"])
    assert lines["scores"] == sets * 4 * 2 * sum(-(-numel // 3) for numel in LAYER.values())
    assert ("activations" in lines) == (salience != "magnitude")


def test_scores_on_the_host_leave_the_gpu(recipe):
    plan = make_plan(recipe(mask={"score_device": "host"}), 3)
    assert sizes(plan.memory["scoring"])["scores"] == 0
    assert sizes(plan.host)["scores"] == 4 * 2 * sum(-(-numel // 3) for numel in LAYER.values())


def test_schedules_add_what_they_keep(recipe):
    buckets = sizes(make_plan(recipe(train={"reduce_bucket": 50}), 2, device="cpu").memory["training"])
    assert buckets["gradient buckets"] == 3 * 4 * 50
    periodic = make_plan(recipe(mask={"schedule": "periodic", "update_every": 2}), 2, device="cpu")
    assert sizes(periodic.memory["scoring"])["Adam moments"] == 8 * 151
    assert sizes(periodic.memory["training"])["entry_steps"] == 4 * 151
    grow = {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5}
    lines = sizes(make_plan(recipe(mask=grow), 2, device="cpu").memory["training"])
    assert lines["growth"] == 8 * 2 * sum(-(-numel // 2) for numel in LAYER.values())


def test_a_lone_rank_gathers_and_receives_nothing(recipe):
    plan = make_plan(recipe(), 1, device="cpu")
    kinds = {kind for lines in plan.memory.values() for kind in sizes(lines)}
    assert not kinds & {"gathered weights", "small weights, whole"}
    assert total(plan.traffic) == 0


def test_an_offloaded_base_is_in_host_memory(recipe, tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 35}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    plan = make_plan(recipe(deepspeed={"config": str(tmp_path / "ds.json")}), 1)
    lines = sizes(plan.memory["training"])
    assert lines["base shard"] == 4 * NORMS and lines["index"] == 0
    assert sizes(plan.host)["offloaded shard"] == 4 * (TARGETS + EMBEDDINGS)
    assert lines["gathered weights"] > 0  # a copy on the GPU, even on one rank


def test_traffic_by_hand(recipe):
    # Everything is within the reuse distance: each weight is gathered once a micro-batch.
    got = sizes(make_plan(recipe(), 3, device="cpu").traffic)
    rounds = 12 // (2 * 3)
    assert got == {"weights, forward": TARGETS * 4 * 2 // 3 * rounds, "gradient": 4 * 301 * 2 // 3 * rounds}


def test_steps_tokens_and_files_by_hand(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join('{"prompt": "a"}\n\n' for _ in range(50)))
    plan = make_plan(recipe(), 3, device="cpu")
    assert {name: value for name, (value, _) in plan.steps.items()} == {
        "sequences an epoch": 50,
        "accumulation": 2,
        "tokens a step": 12 * 16,
        "steps": 13,  # 50 x 3 / 12, rounded up
        "tokens": 13 * 12 * 16,
    }
    assert sizes(plan.files)["a checkpoint"] == 16 * 301
    for changes, each in [
        ({"optimizer": {"name": "sgd"}}, 8),
        ({"optimizer": {"name": "lion"}, "mask": {"schedule": "grad_topk"}}, 12),
        ({"optimizer": {"name": "adamw_8bit"}}, 18),
        ({"optimizer": {"name": "adamw_8bit"}, "mask": {"schedule": "periodic", "update_every": 2}}, 26),
    ]:
        assert sizes(make_plan(recipe(**changes), 3, device="cpu").files)["a checkpoint"] == each * 301
    assert 6 * 301 < sizes(plan.files)["adapter"] < 6 * 301 + 14 * 300


def test_unknown_rows_say_how_to_tell(recipe):
    steps = make_plan(recipe(), 3, device="cpu").steps
    assert steps["steps"][0] is None and "--rows N" in steps["steps"][1]
    assert make_plan(recipe(), 3, num_rows=24, device="cpu").steps["steps"][0] == 6
    given = make_plan(recipe(train={"steps": 7, "epochs": None}), 3, device="cpu").steps
    assert given["steps"] == (7, "train.steps") and given["tokens"][0] == 7 * 12 * 16


def test_a_batch_that_the_ranks_cannot_share_is_refused(recipe):
    with pytest.raises(RecipeError, match="not divisible"):
        make_plan(recipe(), 5)


def test_what_does_not_fit_says_what_would_help(recipe):
    needs = recipe(data={"max_length": 512}, train={"global_batch": 64, "micro_batch": 16})
    plan = make_plan(needs, 1, gpu_gib=2.0)
    assert plan.fits and not plan.suggestions and plan.smallest_world_size == 1
    plan = make_plan(needs, 1, gpu_gib=plan.num_bytes / GIB)  # all of it, and so without the margin
    assert not plan.fits
    by_change = {s.change: s.num_bytes for s in plan.suggestions}
    *alone, together = by_change.values()
    assert alone == sorted(alone) and together < alone[0] and len(alone) > 2
    rows = make_plan(
        needs.model_copy(
            update={
                "train": needs.train.model_copy(update={"micro_batch": 1}),
                "mask": needs.mask.model_copy(update={"calibration_batch": 1}),
            }
        ),
        1,
    )
    assert by_change["train.micro_batch=1 mask.calibration_batch=1"] == rows.num_bytes
    assert "train.activation_checkpointing=non_reentrant" in by_change
    assert all(size < plan.num_bytes for size in by_change.values())


def test_the_margin_is_kept_free():
    line = Line("all", int(72 * GIB), "")
    make = {"recipe": "r", "model": "m", "source": "s", "world_size": 1, "device": "cuda", "host": []}
    make |= {"traffic": [], "steps": {}, "files": [], "memory": {"training": [line]}}
    assert Plan(gpu_gib=80.0, **make).fits
    assert not Plan(gpu_gib=79.9, **make).fits


def test_the_printed_plan_has_every_number_and_80_columns(recipe):
    plan = make_plan(recipe(data={"max_length": 512}), 3, gpu_gib=1.0)
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=80))
    assert all(len(line) <= 80 for line in text.getvalue().splitlines())
    words = " ".join(text.getvalue().split())
    assert "DOES NOT FIT" in words and "smallest world size" in words
    assert "301 entries / 3 ranks x 8 B" in words
    facts = json.loads(json.dumps(plan.as_dict()))
    assert facts["num_bytes"] == max(facts["phase_bytes"].values()) and facts["fits"] is False


def test_live_bytes_counts_storages_while_they_live():
    with LiveBytes() as live:
        one = torch.zeros(100)
        view = one.view(10, 10)
        assert live.now == 400
        two = one + 1
        del one
        assert (live.now, live.peak) == (800, 800)
        del view
        assert (live.now, live.peak) == (400, 800)
        del two
        assert live.now == 0


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
def test_a_dry_run_counts_what_a_real_run_holds(recipe, checkpointing):
    """The same code on real tensors: the storages that live are the same, to the byte."""
    geometry = read_geometry(recipe())
    one = Pass(
        3, 24, checkpointing, "entries", False, checkpointing == "reentrant", 0.05, "sampled", "cpu", True
    )
    arguments = (geometry.config, "causal_lm", "float32", list(geometry.targets), one)
    fake = dry_run(*arguments)
    real = dry_run(*arguments, fake=False)
    assert [(m.kind, m.module, m.start, m.peak) for m in fake.moments] == [
        (m.kind, m.module, m.start, m.peak) for m in real.moments
    ]
    assert max(moment.peak for moment in fake.moments) > 3 * 24 * 260 * 4


def test_gathers_of_three_layers_by_hand():
    """Weights of 10, one a module; forward 0 1 2, backward 2 1 0."""
    marks = [("fetch", m, False) for m in (0, 1, 2)] + [("fetch", m, True) for m in (2, 1, 0)]
    moments = []
    for kind, module, is_backward in marks:
        moments.append(Moment(kind, module, is_backward, False, 0, 100))
        moments.append(Moment("release", module, is_backward, False, 0, 0))
    trace = Trace(["a", "b", "c"], {0: [0], 1: [1], 2: [2]}, moments)
    numel = {"a": 10, "b": 10, "c": 10}

    def peak(**changes) -> tuple:
        rules = {"prefetch_bucket": 0, "max_live": 1000, "reuse_distance": 0, "persistent": frozenset()}
        rules |= {"targets": frozenset(), "is_shared": True, "on_cpu": False, **changes}
        got = simulate(trace, numel, 4, GatherRules(**rules))
        return got.most_whole, got.traffic["forward"], got.traffic["backward"], got.total

    assert peak() == (10, 30, 30, 140)
    assert peak(reuse_distance=1) == (10, 30, 20, 140)  # c is needed next
    assert peak(reuse_distance=1000) == (30, 30, 0, 220)
    assert peak(prefetch_bucket=10)[0] == 30  # in the backward of c, b and a are on their way
    assert peak(persistent=frozenset("ab")) == (10, 10, 10, 140)
    assert peak(is_shared=False) == (0, 0, 0, 100)


def test_the_rows_of_a_plan_are_those_of_the_run(recipe, tmp_path):
    from speft_ds.plan.plan import find_order

    (tmp_path / "rows.csv").write_text("prompt,response\n" + "a,b\n" * 30)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 50)
    csv, jsonl = str(tmp_path / "rows.csv"), str(tmp_path / "rows.jsonl")
    assert len(find_order(recipe(data={"path": csv}))[0]) == 30
    assert len(find_order(recipe(data={"select": "random", "select_rows": 20}))[0]) == 20
    mixture = [{"path": csv, "weight": 3.0}, {"path": jsonl, "weight": 1.0}]
    order, _ = find_order(recipe(data={"path": None, "mixture": mixture}))
    assert len(order) == 40  # the scarcer source once, and a third of that of the other
    assert find_order(recipe(data={"path": str(tmp_path / "nowhere.jsonl")}))[0] is None
