"""A run that stops and goes on is the uninterrupted run: bit for bit on as many ranks, else to summation."""

import pytest
import torch

from distributed.checkpoint_checks import (
    assert_resumed_is_uninterrupted,
    assert_same,
    check_takes_up_weights,
    contents,
    names,
    own_storage,
    run_piece,
)
from distributed.reference import ADAMW_8BIT, LION, SGD, make_recipe

ADAMW = {"weight_decay": 0.1, "eps": 1e-5}  # eps: see test_schedules
PERIODIC = {"schedule": "periodic", "update_every": 4}
SFT_AG = {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5, "growth_steps": 3}
SFT_MA = {"schedule": "drop_grow", "growth": "sft_ma", "update_every": 4}
TOPK = {"schedule": "grad_topk", "topk_fraction": 0.3}
SAMPLED = {"layer_gate": "sampled", "gate_layers": 1, "gate_every": 3}
IMPORTANCE = {"layer_gate": "importance", "gate_layers": 1, "gate_every": 2}
HALF = {"layer_gate": "half", "gate_every": 3}
STEPS = 14
CASES = {  # optimizer, mask section, step to stop after, changes of the mask until the end
    "static": (ADAMW, {}, 4, 0),
    "periodic before its first change": (ADAMW, PERIODIC, 3, 3),
    "periodic after two changes": (ADAMW, PERIODIC, 9, 3),
    "sft_ag between windows": (ADAMW, SFT_AG, 6, 2),
    "sft_ag within a window": (ADAMW, SFT_AG, 9, 2),
    "sft_ma": (ADAMW, SFT_MA, 6, 3),
    "grad_topk": (ADAMW, TOPK, 5, 0),
    "sampled": (ADAMW, SAMPLED, 4, 0),
    "importance within a period": (ADAMW, IMPORTANCE, 7, 0),
    "importance between periods": (ADAMW, IMPORTANCE, 6, 0),
    "half and periodic": (ADAMW, {**PERIODIC, **HALF}, 7, 3),
    "8 bits": (ADAMW_8BIT, {}, 4, 0),
    "8 bits, periodic after two changes": (ADAMW_8BIT, PERIODIC, 9, 3),
    "8 bits, sft_ag within a window": (ADAMW_8BIT, SFT_AG, 9, 2),
    "8 bits, grad_topk": (ADAMW_8BIT, TOPK, 5, 0),
    "8 bits, half": (ADAMW_8BIT, HALF, 4, 0),
    "sgd": (SGD, SFT_AG, 6, 2),
    "sgd without momentum": ({**SGD, "momentum": 0.0}, PERIODIC, 6, 3),
    "lion and half": (LION, HALF, 4, 0),
}
IN_BFLOAT16 = ["static", "periodic after two changes", "sft_ag within a window"]


@pytest.fixture
def recipe(tiny, tmp_path):
    """recipe(folder, mask, optimizer, more sections): its output is tmp_path/folder."""

    def make(folder, mask, optimizer=ADAMW, train=None, **sections):
        sections |= {"mask": mask, "optimizer": optimizer, "train": {"steps": STEPS, **(train or {})}}
        return make_recipe(tiny, tmp_path / folder, **sections)

    return make


@pytest.mark.parametrize(
    ("case", "model"),
    [(case, {}) for case in CASES]
    + [(case, {"dtype": "bfloat16"}) for case in IN_BFLOAT16]
    + [("periodic after two changes", {"dtype": "bfloat16", "base_format": "nf4"})],
)
def test_resumed_is_uninterrupted(ranks, recipe, case, model):
    optimizer, mask, stop, num_changes = CASES[case]
    recipe_of = lambda folder: recipe(folder, mask, optimizer, model=model)  # noqa: E731
    whole = assert_resumed_is_uninterrupted(ranks, recipe_of, stop)
    assert len(whole["changes"]) == num_changes
    own = own_storage(whole["checkpoint"])
    assert [bool(of_rank) for of_rank in own] == ["8bit" in optimizer.get("name", "")] * 2


NF4 = {"base_format": "nf4"}


@pytest.mark.parametrize(
    ("optimizer", "mask", "model"),
    [(ADAMW, mask, {}) for mask in ({}, PERIODIC, SFT_AG, SFT_MA, TOPK, SAMPLED, IMPORTANCE, HALF)]
    + [(ADAMW_8BIT, {}, {}), (ADAMW_8BIT, PERIODIC, {})]
    + [(ADAMW, {"start": "exact"}, NF4), (ADAMW, PERIODIC, NF4)],
)
def test_any_number_of_ranks_goes_on(ranks, recipe, optimizer, mask, model):
    """1 -> 2 -> 4 -> 1 ranks, each with another micro-batch: the same rows and masks, equal to 1e-5, or as
    far as 8 bits are, which are rounded in blocks that depend on the ranks.
    """

    def piece(folder, world_size, micro_batch, stop, checkpoint=None):
        made = recipe(folder, mask, optimizer, train={"micro_batch": micro_batch}, model=model)
        return ranks(world_size)(run_piece, recipe=made, stop=stop, checkpoint=checkpoint)[0]

    whole, checkpoint, ids, losses = piece("whole", 1, 2, STEPS), None, [], []
    for world_size, micro_batch, stop in [(1, 8, 3), (2, 4, 7), (4, 1, 10), (1, 2, STEPS)]:
        made = piece(f"to{stop}", world_size, micro_batch, stop, checkpoint)
        checkpoint, ids, losses = made["checkpoint"], ids + made["ids"], losses + made["losses"]
    is_rounded = optimizer is ADAMW_8BIT
    assert ids == whole["ids"]
    assert losses == pytest.approx(whole["losses"], abs=3e-3 if is_rounded else 1e-5)
    if not is_rounded:
        assert made["changes"] == whole["changes"]
        assert_same(contents(checkpoint), contents(whole["checkpoint"]), tolerance=1e-5)
    elif not mask:
        one, other = (contents(run)["trained"]["delta"] for run in (checkpoint, whole["checkpoint"]))
        assert 0 < (one - other).abs().mean() < 0.03 * other.abs().mean()


def test_no_base_weight_and_16_bytes_an_entry(ranks, recipe):
    made = ranks(2)(run_piece, recipe=recipe("run", {"density": 0.5}), stop=2)[0]
    parts = sorted(made["checkpoint"].glob("*.safetensors"))
    columns = {"index", "delta", "exp_avg", "exp_avg_sq"}
    allowed = {f"trained.{name}" for name in columns} | {"dropped.index", "dropped.delta", "own.random_cpu"}
    found = [set(names(part)) - {"own.random_cuda"} for part in parts]  # which ranks on GPUs have, too
    assert found == [allowed] * 2
    entries = sum(index.numel() for index in contents(made["checkpoint"])["trained"]["index"].values())
    overhead = 5056 + 2048  # of a part: torch's random state, the header
    assert 16 * entries < sum(part.stat().st_size for part in parts) < 16 * entries + 2 * overhead


def test_eight_bits_are_kept_in_their_own_storage_and_as_columns(ranks, recipe):
    made = ranks(2)(run_piece, recipe=recipe("run", PERIODIC, ADAMW_8BIT), stop=6)[0]
    columns = contents(made["checkpoint"])["trained"]
    assert columns.keys() == {"index", "delta", "exp_avg", "exp_avg_sq", "entry_step"}
    assert columns["exp_avg"].dtype == torch.float32 and columns["exp_avg"].any()
    stored = {f"own.optimizer.{n}.{kind}" for n in ("exp_avg", "exp_avg_sq") for kind in ("code", "absmax")}
    for of_rank in own_storage(made["checkpoint"]):
        assert set(of_rank) == stored | {"own.optimizer.entry_at"}
        assert of_rank["own.optimizer.exp_avg.code"].dtype == torch.uint8


@pytest.mark.parametrize(("base_format", "world_sizes"), [(None, (1, 2, 4)), ("nf4", (2,))])
def test_the_weights_are_there_before_the_first_step(ranks, recipe, base_format, world_sizes):
    of_two = recipe("run", PERIODIC, model={"dtype": "bfloat16", "base_format": base_format})
    made = ranks(2)(run_piece, recipe=of_two, stop=6)[0]
    for world_size in world_sizes:
        arguments = {"checkpoint": made["checkpoint"], "weights": made["weights"]}
        ranks(world_size)(check_takes_up_weights, recipe=of_two, **arguments)
