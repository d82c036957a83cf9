"""A run that stops and goes on is the uninterrupted run: bit for bit on as many ranks, else to summation."""

import pytest
import torch

from distributed import checkpoint_checks
from distributed.checkpoint_checks import contents, names
from distributed.reference import make_recipe

PERIODIC = {"schedule": "periodic", "update_every": 4}
SFT_AG = {"schedule": "drop_grow", "growth": "sft_ag", "update_every": 5, "growth_steps": 3}
SFT_MA = {"schedule": "drop_grow", "growth": "sft_ma", "update_every": 4}
TOPK = {"schedule": "grad_topk", "topk_fraction": 0.3}
SAMPLED = {"layer_gate": "sampled", "gate_layers": 1, "gate_every": 3}
CASES = {  # mask section, step to stop after
    "static": ({}, 4),
    "periodic before its first change": (PERIODIC, 3),
    "periodic after two changes": (PERIODIC, 9),
    "sft_ag between windows": (SFT_AG, 6),
    "sft_ag within a window": (SFT_AG, 9),
    "sft_ma": (SFT_MA, 6),
    "grad_topk": (TOPK, 5),
    "sampled": (SAMPLED, 4),
    "half and periodic": ({**PERIODIC, "layer_gate": "half", "gate_every": 3}, 7),
}
STEPS = 14


def recipe_of(tiny, folder, mask, **sections):
    train = {"steps": STEPS, **sections.pop("train", {})}
    optimizer = {"weight_decay": 0.1, "eps": 1e-5}  # eps: see test_schedules
    return make_recipe(tiny, folder, mask=mask, train=train, optimizer=optimizer, **sections)


def same(got, wanted, path="checkpoint", tolerance=None):
    """Two nested documents are equal, floats of tensors to a tolerance where there is one."""
    assert type(got) is type(wanted), path
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), path
        for key in wanted:
            same(got[key], wanted[key], f"{path}.{key}", tolerance)
    elif isinstance(wanted, torch.Tensor):
        if tolerance is None or not wanted.is_floating_point():
            assert torch.equal(got, wanted), path
        else:
            assert got.shape == wanted.shape, path
            assert torch.allclose(got, wanted, rtol=0, atol=tolerance), (path, (got - wanted).abs().max())
    else:
        assert got == wanted, path


IN_BFLOAT16 = ["static", "periodic after two changes", "sft_ag within a window"]


@pytest.mark.parametrize(
    ("case", "dtype"), [(c, "float32") for c in CASES] + [(c, "bfloat16") for c in IN_BFLOAT16]
)
def test_resumed_is_uninterrupted(ranks, tiny, tmp_path, case, dtype):
    mask, stop = CASES[case]

    def piece(folder, stop, checkpoint=None):
        recipe = recipe_of(tiny, tmp_path / folder, mask, model={"dtype": dtype})
        run_piece = checkpoint_checks.run_piece
        return ranks(2)(run_piece, recipe=recipe, stop=stop, checkpoint=checkpoint)[0]

    whole, first = piece("whole", STEPS), piece("first", stop)
    second = piece("second", STEPS, first["checkpoint"])
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["ids"] + second["ids"] == whole["ids"]
    same(contents(second["checkpoint"]), contents(whole["checkpoint"]))
    same(torch.load(second["weights"]), torch.load(whole["weights"]), "weights")
    expected = {"periodic": 3, "drop_grow": 3 if "sft_ma" in case else 2}.get(mask.get("schedule"), 0)
    assert len(second["changes"]) == expected and second["changes"] == whole["changes"]


WORLDS = [(1, 3), (2, 7), (4, 10), (1, STEPS)]  # ranks, step to stop after
MANY = {"static": {}, "periodic": PERIODIC, "sft_ag": SFT_AG, "sft_ma": SFT_MA, "grad_topk": TOPK}


@pytest.mark.parametrize("case", [*MANY, "sampled", "half"])
def test_any_number_of_ranks_goes_on(ranks, tiny, tmp_path, case):
    """1 -> 2 -> 4 -> 1 ranks, each with another micro-batch: the same rows and masks, equal to 1e-5."""
    gates = {"sampled": SAMPLED, "half": {"layer_gate": "half", "gate_every": 3}}
    mask = MANY.get(case, gates.get(case))

    def piece(folder, world_size, micro_batch, stop, checkpoint=None):
        recipe = recipe_of(tiny, tmp_path / folder, mask, train={"micro_batch": micro_batch})
        run_piece = checkpoint_checks.run_piece
        return ranks(world_size)(run_piece, recipe=recipe, stop=stop, checkpoint=checkpoint)[0]

    whole, checkpoint, ids, losses = piece("whole", 1, 2, STEPS), None, [], []
    for number, (world_size, stop) in enumerate(WORLDS):
        micro_batch = (8, 4, 1, 2)[number]
        made = piece(f"piece{number}", world_size, micro_batch, stop, checkpoint)
        checkpoint, ids, losses = made["checkpoint"], ids + made["ids"], losses + made["losses"]
    assert ids == whole["ids"] and losses == pytest.approx(whole["losses"], abs=1e-5)
    assert made["changes"] == whole["changes"]
    same(contents(checkpoint), contents(whole["checkpoint"]), tolerance=1e-5)


def test_no_base_weight_and_16_bytes_an_entry(ranks, tiny, tmp_path):
    recipe = recipe_of(tiny, tmp_path / "run", {"density": 0.5})
    folder = ranks(2)(checkpoint_checks.run_piece, recipe=recipe, stop=2)[0]["checkpoint"]
    parts = sorted(folder.glob("*.safetensors"))
    columns = {"index", "delta", "exp_avg", "exp_avg_sq"}
    allowed = {f"trained.{name}" for name in columns} | {"dropped.index", "dropped.delta", "own.random_cpu"}
    assert len(parts) == 2 and all(set(names(part)) == allowed for part in parts)
    entries = sum(index.numel() for index in contents(folder)["trained"]["index"].values())
    overhead = 5056 + 2048  # of a part: torch's random state, the header
    assert 16 * entries < sum(part.stat().st_size for part in parts) < 16 * entries + 2 * overhead


def test_the_weights_are_there_before_the_first_step(ranks, tiny, tmp_path):
    recipe = recipe_of(tiny, tmp_path / "run", PERIODIC, model={"dtype": "bfloat16"})
    made = ranks(2)(checkpoint_checks.run_piece, recipe=recipe, stop=6)[0]
    for world_size in (1, 2, 4):
        ranks(world_size)(
            checkpoint_checks.check_takes_up_weights,
            recipe=recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": 2})}),
            checkpoint=made["checkpoint"],
            weights=made["weights"],
        )
