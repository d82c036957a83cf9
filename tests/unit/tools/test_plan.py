"""A plan's arithmetic, by hand for a tiny model; what it says, and to whom."""

import io
import json

import psutil
import pytest
import torch
from rich.console import Console
from torch import nn

from speft_ds.errors import RecipeError
from speft_ds.sparse.kernels.measure import device_name
from speft_ds.sparse.optim.optimizers import make_optimizer
from speft_ds.tools.plan.geometry import read_geometry
from speft_ds.tools.plan.make_plan import GPU_GIB, find_order, make_plan
from speft_ds.tools.plan.memory_model import optimizer_state
from speft_ds.tools.plan.print_plan import gib, print_plan
from speft_ds.tools.plan.setup import GIB, Line, Setup, total
from unit.sparse.tables import keep, sampling

# tiny.make_model: 35 wide, 53 in the MLP, 5 heads of 8 (1 key and value head), 2 layers, vocabulary 260.
LAYER = [40 * 35, 8 * 35, 8 * 35, 35 * 40, 53 * 35, 53 * 35, 35 * 53]  # q, k, v, o, gate, up, down
TARGETS = 2 * sum(LAYER)
NORMS = 5 * 35
EMBEDDINGS = 2 * 260 * 35


def sizes(lines: list[Line]) -> dict[str, int]:
    return {line.kind: line.num_bytes for line in lines}


def shards(ranks: int) -> int:
    """Elements of a rank's shards of the targets."""
    return 2 * sum(-(-numel // ranks) for numel in LAYER)


@pytest.fixture
def planned(recipe):
    """A function: phase, ranks, sections -> kind -> bytes per rank on a CPU."""

    def plan(phase: str, ranks: int = 2, **sections) -> dict[str, int]:
        return sizes(make_plan(recipe(**sections), ranks, device="cpu").memory[phase])

    return plan


def test_bfloat16_halves_the_base_and_its_values_only(planned):
    wide, short = planned("training"), planned("training", model={"dtype": "bfloat16"})
    halved = {"base shard", "small weights, gathered", "base values", "gathered weights"}
    assert all(2 * short[kind] == wide[kind] for kind in halved)
    assert all(short[kind] == wide[kind] for kind in wide.keys() - halved - {"activations"})


def test_auto_is_planned_as_bfloat16_and_says_so(recipe):
    short = recipe(model={"dtype": "bfloat16"})
    auto = short.model_copy(update={"model": short.model.model_copy(update={"dtype": "auto"})})
    plans = [make_plan(each, 2) for each in (short, auto)]
    assert plans[0].memory == plans[1].memory
    assert [any("model.dtype=auto" in note for note in plan.notes) for plan in plans] == [False, True]


@pytest.mark.parametrize(
    ("salience", "sets"), [("gradient", 1), ("snip", 2), ("magnitude", 1), ("synflow", 2), ("grasp", 4)]
)
def test_scores_by_hand(planned, salience, sets):
    lines = planned("scoring", 3, mask={"salience": salience})
    assert lines["scores"] == sets * 4 * shards(3)
    assert ("activations" in lines) == (salience != "magnitude")


def test_scores_on_the_host_leave_the_gpu(recipe):
    plan = make_plan(recipe(mask={"score_device": "host"}), 3)
    assert sizes(plan.memory["scoring"])["scores"] == 0
    assert sizes(plan.host)["scores"] == 4 * shards(3)


def test_schedules_add_what_they_keep(planned):
    assert planned("training", train={"reduce_bucket": 50})["gradient buckets"] == 3 * 4 * 50
    periodic = {"schedule": "periodic", "update_every": 2}
    assert planned("scoring", mask=periodic)["Adam moments"] == 8 * 151
    assert planned("training", mask=periodic)["entry_steps"] == 4 * 151
    for growth, size in (("sft_ag", 8), ("sft_ma", 4)):
        grow = {"schedule": "drop_grow", "growth": growth, "update_every": 5}
        assert planned("training", mask=grow)["growth"] == size * shards(2)


NF4 = {"base_format": "nf4"}
HEIGHTS = [40, 8, 8, 35, 53, 53, 35]  # of the weights of a layer: each row is one block, which is filled up


@pytest.fixture
def none_persistent(tmp_path):
    """A DeepSpeed section with which every weight is gathered for its use."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return {"config": str(tmp_path / "ds.json")}


def test_a_base_in_few_bits_by_hand(recipe, planned, none_persistent):
    plain = planned("training", deepspeed=none_persistent)
    few = planned("training", model=NF4, deepspeed=none_persistent)
    assert few["base shard"] == plain["base shard"] - 4 * shards(2)
    assert few["codes"] == 2 * sum(32 * rows // 2 for rows in HEIGHTS)
    assert few["scales"] == 2 * sum(4 * -(-rows // 2) for rows in HEIGHTS)
    geometry = read_geometry(recipe())
    values = sum(-(-count // 2) for count in geometry.entries.values())
    assert few["values"] == 4 * values and 301 / 2 <= values <= 301 / 2 + 7
    assert few["places of values"] == 4 * 151
    assert 0 < few["decoded weight"] <= 53 * 35 * (4 + 6)
    assert few["gathered weights"] < plain["gathered weights"] - 2 * TARGETS
    assert list(geometry.plain_linears) == list(geometry.targets)


def test_codes_scales_and_values_are_what_is_received(recipe, none_persistent):
    made = recipe(model={**NF4, "dtype": "bfloat16"}, deepspeed=none_persistent)
    got = sizes(make_plan(made, 3, device="cpu").traffic)
    values = sum(-(-count // 3) * 3 for count in read_geometry(made).entries.values())
    num_bytes = 2 * sum(HEIGHTS) * (32 + 4) + 2 * (values + NORMS + EMBEDDINGS)
    assert got["weights, forward"] == num_bytes * 2 // 3 * 2


def test_a_base_is_loaded_before_it_is_in_few_bits(recipe):
    everything = 4 * (shards(2) + (NORMS + EMBEDDINGS) // 2)
    start, error = {"mask": {"start": "exact"}}, {"mask": {"salience": "quant_error"}}
    for sections in ({}, start, error):
        loading = sizes(make_plan(recipe(model=NF4, **sections), 2, device="cpu").memory["loading"])
        assert loading["base, loaded"] == pytest.approx(everything, abs=20)
        assert ("codes" in loading) == bool(sections)
        scoring = sizes(make_plan(recipe(model=NF4, **sections), 2, device="cpu").memory["scoring"])
        assert scoring.get("original weights", 0) == bool(sections) * 4 * shards(2)
        plan = make_plan(recipe(model=NF4, **sections), 2)
        assert "loading" not in plan.memory
        held = "original weights" if sections else "base, while loading"
        assert sizes(plan.host)[held] == loading["base, loaded"]
    assert "loading" not in make_plan(recipe(), 2, device="cpu").memory


@pytest.mark.parametrize("salience", ["grasp", "synflow", "magnitude"])
def test_weights_are_complete_while_a_metric_changes_them(planned, salience):
    lines = planned("scoring", model=NF4, mask={"salience": salience})
    dense = salience != "magnitude"
    assert lines.get("complete weights", 0) == dense * 4 * shards(2)
    assert ("decoded weight" in lines) == (not dense)


def test_a_stash_takes_less_in_training_alone(planned):
    plain, dynamic = planned("training"), planned("training", train={"stash": "dynamic"})
    widest, least = (planned("training", train={"stash": name}) for name in ("bfp8", "bfp4"))
    assert dynamic == widest  # the most bits that it may come to
    assert least["activations"] < widest["activations"] < plain["activations"]
    kinds = plain.keys() - {"activations", "gathered weights"}  # of what is gathered, another moment's
    assert all(least[kind] == plain[kind] for kind in kinds) and least.keys() == plain.keys()
    assert planned("scoring", train={"stash": "bfp4"}) == planned("scoring")


def test_a_single_rank_gathers_and_receives_nothing(recipe):
    plan = make_plan(recipe(), 1, device="cpu")
    kinds = {kind for lines in plan.memory.values() for kind in sizes(lines)}
    assert not kinds & {"gathered weights", "small weights, gathered"}
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
        "sequences per epoch": 50,
        "accumulation": 2,
        "tokens per step": 12 * 16,
        "steps": 13,  # 50 x 3 / 12, rounded up
        "tokens": 13 * 12 * 16,
    }
    assert 6 * 301 < sizes(plan.files)["adapter"] < 6 * 301 + 14 * 300


PERIODIC = {"schedule": "periodic", "update_every": 2}


@pytest.mark.parametrize(
    ("optimizer", "mask", "each"),
    [
        ("adamw", {}, 16),
        ("sgd", {}, 8),
        ("lion", {"schedule": "grad_topk"}, 12),
        ("adamw_8bit", {}, 18),
        ("adamw_8bit", PERIODIC, 26),
    ],
)
def test_bytes_of_a_checkpoint_by_hand(recipe, optimizer, mask, each):
    plan = make_plan(recipe(optimizer={"name": optimizer}, mask=mask), 3, device="cpu")
    assert sizes(plan.files)["a checkpoint"] == each * 301


OWN = 501  # 1501 / 3, rounded up: two blocks of 8-bit moments


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "sgd with momentum", "lion"])
@pytest.mark.parametrize("schedule", ["static", "grad_topk", "periodic"])
def test_the_state_is_what_is_allocated(recipe, name, schedule):
    name, _, momentum = name.partition(" with ")
    mask = {"num_trainable": 1501, "schedule": schedule}
    mask |= {"update_every": 2} if schedule == "periodic" else {}
    made = recipe(mask=mask, optimizer={"name": name, **({momentum: 0.5} if momentum else {})})
    setup = Setup(made, read_geometry(made), {"stage": 3}, 3, "cpu")
    assert setup.num_own == OWN
    optimizer = make_optimizer(
        nn.Parameter(torch.zeros(OWN)), made.optimizer, entry_steps=made.mask.has_entry_steps
    )
    if schedule == "periodic":  # the same entries again
        optimizer.remap_state(
            nn.Parameter(torch.zeros(OWN)), torch.arange(OWN), torch.ones(OWN, dtype=torch.bool)
        )
    tensors = [value for value in optimizer.state[optimizer.delta].values() if value.dim()]
    for moment in getattr(optimizer, "moments", {}).values():
        tensors += [moment.code, moment.absmax]
    if getattr(optimizer, "entry_at", None) is not None:
        tensors.append(optimizer.entry_at)
    assert sum(tensor.nbytes for tensor in tensors) == total(optimizer_state(setup))


def test_unknown_rows_say_how_to_tell(recipe):
    steps = make_plan(recipe(), 3, device="cpu").steps
    assert steps["steps"][0] is None and "--rows N" in steps["steps"][1]
    assert make_plan(recipe(), 3, num_rows=24, device="cpu").steps["steps"][0] == 6
    given = make_plan(recipe(train={"steps": 7, "epochs": None}), 3, device="cpu").steps
    assert given["steps"] == (7, "train.steps") and given["tokens"][0] == 7 * 12 * 16


def test_the_rows_of_a_plan_are_those_of_the_run(recipe, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\n" + "a,b\n" * 30)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 50)
    csv, jsonl = str(tmp_path / "rows.csv"), str(tmp_path / "rows.jsonl")
    assert len(find_order(recipe(data={"path": csv}))[0]) == 30
    assert len(find_order(recipe(data={"select": "random", "select_rows": 20}))[0]) == 20
    mixture = [{"path": csv, "weight": 3.0}, {"path": jsonl, "weight": 1.0}]
    order, _ = find_order(recipe(data={"path": None, "mixture": mixture}))
    assert len(order) == 40  # the scarcer source once, and a third of that of the other
    assert find_order(recipe(data={"path": str(tmp_path / "nowhere.jsonl")}))[0] is None


def test_a_batch_that_the_ranks_cannot_share_is_refused(recipe):
    with pytest.raises(RecipeError) as refused:
        make_plan(recipe(), 5)
    assert "train.global_batch" in refused.value.problems[0].where and refused.value.problems[0].fix


def test_what_does_not_fit_says_what_would_help(recipe):
    needs = {"data": {"max_length": 512}, "train": {"global_batch": 64, "micro_batch": 16}}
    plan = make_plan(recipe(**needs), 1, gpu_gib=2.0)
    assert plan.fits and not plan.suggestions and plan.smallest_world_size == 1
    plan = make_plan(recipe(**needs), 1, gpu_gib=plan.num_bytes / GIB)  # all of it, without the margin
    assert not plan.fits
    by_change = plan.suggestions
    *alone, together = by_change.values()
    assert alone == sorted(alone) and together < alone[0] and len(alone) > 2
    assert all(size < plan.num_bytes for size in by_change.values())
    assert "train.activation_checkpointing=non_reentrant" in by_change
    in_few_bits = make_plan(recipe(**needs, model=NF4), 1).num_bytes
    assert by_change.get("model.base_format=nf4", in_few_bits) == in_few_bits
    needs["train"]["micro_batch"], needs["mask"] = 1, {"calibration_batch": 1}
    one_row = make_plan(recipe(**needs), 1).num_bytes
    assert by_change["train.micro_batch=1 mask.calibration_batch=1"] == one_row


def test_few_bits_are_offered_where_they_help(recipe, monkeypatch):
    monkeypatch.setattr("speft_ds.tools.plan.memory_model.PROCESS", {"cuda": 0})
    wide = {"train": {"micro_batch": 1}, "mask": {"num_trainable": 301, "calibration_batch": 1}}
    plan = make_plan(recipe(**wide), 1, gpu_gib=1e-5)
    few = make_plan(recipe(**wide, model=NF4), 1, gpu_gib=1e-5)
    assert plan.suggestions["model.base_format=nf4"] == few.num_bytes < plan.num_bytes
    assert not any("base_format" in change for change in few.suggestions)


def printed(plan, details):
    """The words of a printed plan, whose lines have 80 columns at most."""
    text = io.StringIO()
    print_plan(plan, details, Console(file=text, width=80))
    assert all(len(line) <= 80 for line in text.getvalue().splitlines())
    return " ".join(text.getvalue().split())


def test_a_printed_plan_begins_with_what_to_do(recipe):
    needs = {"data": {"max_length": 512}, "train": {"global_batch": 64, "micro_batch": 16}}
    plan = make_plan(recipe(**needs), 2, gpu_gib=1.0)
    words = printed(plan, details=False)
    assert words.startswith("DOES NOT FIT") and gib(plan.num_bytes) in words[:150] and plan.suggestions
    changes = [words.index(change.split()[0]) for change in plan.suggestions]
    assert max(changes) < words.index("memory per rank") and " entries / " not in words
    assert all(f"{phase} {gib(total(lines))}" in words for phase, lines in plan.memory.items())
    assert gib(total(plan.traffic)) in words and all(gib(file.num_bytes) in words for file in plan.files)
    fitting = make_plan(recipe(), 1)
    assert printed(fitting, details=False).startswith("fits: ") and fitting.gpu_gib == GPU_GIB


def test_a_plan_knows_what_bfloat16_costs_on_this_cpu(recipe, monkeypatch):
    monkeypatch.setattr("speft_ds.tools.plan.make_plan.bfloat16_cost", lambda: 37.0)
    plan = make_plan(recipe(model={"dtype": "bfloat16"}), 1, device="cpu")
    (note,) = [note for note in plan.notes if "37" in note]
    assert "model.dtype=float32" in note and plan.gpu_gib < psutil.virtual_memory().total / GIB
    assert not [note for note in make_plan(recipe(), 1, device="cpu").notes if "37" in note]  # float32


def test_the_details_of_a_plan_have_every_number(recipe):
    plan = make_plan(recipe(data={"max_length": 512}), 3, gpu_gib=1.0)
    words = printed(plan, details=True)
    lines = [line for phase in plan.memory.values() for line in phase] + plan.host + plan.traffic + plan.files
    assert all(f" {line.kind} " in words for line in lines)
    assert all(change.split()[0] in words for change in plan.suggestions)
    assert "DOES NOT FIT" in words and "301 entries / 3 ranks x 8 B" in words
    assert plan.num_bytes == max(map(total, plan.memory.values())) and not plan.fits


TOKENS, ROWS, LENGTH = 2 * 16, 2, 16  # of a micro-batch
FORWARD = TOKENS * TARGETS
INPUTS = TOKENS * (TARGETS - sum(LAYER[:3]))  # the embeddings need no gradient
HEAD_BOTH_WAYS = 2 * ROWS * (LENGTH - 1) * 35 * 260  # of label tokens
ATTENTION = 2 * ROWS * 5 * LENGTH**2 * 8  # layers; queries x keys
# Attention's backward multiplies five times: it makes the scores again.
MODEL = FORWARD + INPUTS + HEAD_BOTH_WAYS + (2 + 5) * ATTENTION


def test_multiply_adds_by_hand(recipe):
    one = make_plan(recipe(train={"sparse_backend": "dense"}), 2, device="cpu").arithmetic
    assert (one.model, one.dense, one.mask) == (MODEL, FORWARD, FORWARD)
    assert one.share == one.dense_share == FORWARD / (MODEL + FORWARD)
    again = {"activation_checkpointing": "non_reentrant"}
    one = make_plan(recipe(train=again), 2, device="cpu").arithmetic
    of_inputs = TOKENS * sum(LAYER[:3])  # a checkpoint's input needs its gradient, in the first layer, too
    assert one.model == MODEL + of_inputs + FORWARD + 2 * ATTENTION


@pytest.mark.parametrize(
    ("device", "sections", "backend", "of_dense"),
    [
        ("cpu", {}, "sampled", 301 / TARGETS),
        ("cuda", {}, "dense", 1.0),  # more than 0.65%
        ("cuda", {"mask": {"compute": 0.25}}, "columns", 0.25),
        ("cpu", {"mask": {"compute": 0.25, "num_trainable": 4000}}, "columns", 0.25),  # dense inside
        ("cpu", {"mask": {"compute": 0.25}}, "columns", 301 / TARGETS),  # sampled inside
    ],
)
def test_the_masks_multiply_adds_are_its_backends(recipe, device, sections, backend, of_dense):
    plan = make_plan(recipe(**sections), 2, device=device)
    one = plan.arithmetic
    assert (one.backend, one.device) == (backend, None)
    assert one.mask == pytest.approx(of_dense * FORWARD, abs=1)
    words = printed(plan, details=False)
    assert f"{one.share:.2%}" in words and f"{one.dense_share:.1%}" in words and backend in words
    assert f"{of_dense:.2%}" in printed(plan, details=True) and "rule of thumb" in words


@pytest.mark.parametrize(("is_cheap", "backend"), [(True, "sampled"), (False, "dense")])
def test_a_plan_goes_by_what_was_measured_for_its_threads(recipe, tmp_path, monkeypatch, is_cheap, backend):
    monkeypatch.setenv("SPEFT_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPEFT_DS_KERNELS", "measured")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cpu = torch.device("cpu")
    keep(sampling(is_cheap, device=device_name(cpu, 3)))
    keep(sampling(not is_cheap, device=device_name(cpu, 2)))
    keep(sampling(not is_cheap, device=device_name(cpu, 3), dtype="bfloat16"))
    one = make_plan(recipe(), 2, device="cpu").arithmetic
    assert (one.backend, one.device) == (backend, device_name(cpu, 3))
    assert device_name(cpu, 3) in printed(make_plan(recipe(), 2, device="cpu"), details=False)
    if not torch.cuda.is_available():
        assert make_plan(recipe(), 2).arithmetic.device is None  # of a GPU nothing is known here
    monkeypatch.setenv("SPEFT_DS_KERNELS", "rules")
    one = make_plan(recipe(), 2, device="cpu").arithmetic
    assert (one.backend, one.device) == ("sampled", None)
