"""Scores of the weights against dense ones in one process, and what scoring leaves behind: nothing."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed import salience_checks as checks
from distributed.reference import make_recipe

OF_GRADIENT = ["gradient", "snip", "force", "taylor_fo", "grad_low_magnitude"]
METRICS = [*OF_GRADIENT, "fisher", "magnitude", "low_magnitude", "synflow", "lift"]
# In batches of 3: on 2 and 4 ranks some get a filler, and the last batch is short.
SAMPLES = {"calibration_samples": 13, "calibration_batch": 3}


@pytest.fixture(scope="session")
def checkpoints(tiny):
    """`tiny`, and `rich`: biases, norm weights of both signs, zeros of both signs in every matrix."""
    model = AutoModelForCausalLM.from_pretrained(tiny["bias"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))
            else:
                parameter.view(-1)[torch.tensor([1, 40, 279])] = torch.tensor([-0.0, 0.0, -0.0])
    folder = tiny["folder"] / "rich"
    shutil.copytree(tiny["bias"], folder)
    model.save_pretrained(folder)
    return {**tiny, "rich": folder}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_are_the_dense_ones(ranks, checkpoints, tmp_path, world_size):
    recipe = make_recipe(checkpoints, tmp_path, "rich", mask=SAMPLES)
    ranks(world_size)(checks.check_scores, recipe=recipe, metrics=METRICS)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("checkpoint", ["untied", "rich"])
def test_grasp_has_the_exact_hessian(ranks, checkpoints, tmp_path, world_size, checkpoint):
    recipe = make_recipe(checkpoints, tmp_path, checkpoint, mask=SAMPLES)
    ranks(world_size)(checks.check_scores, recipe=recipe, metrics=["grasp"])


@pytest.mark.parametrize("checkpoint", ["tied", "bias"])
def test_scores_of_other_checkpoints(ranks, tiny, tmp_path, checkpoint):
    recipe = make_recipe(tiny, tmp_path, checkpoint, mask=SAMPLES)
    ranks(2)(checks.check_scores, recipe=recipe, metrics=[*OF_GRADIENT, "fisher", "synflow"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_scores_of_the_head(ranks, tiny, tmp_path, world_size):
    """It sees the hidden states of the labels alone."""
    recipe = make_recipe(tiny, tmp_path, mask={**SAMPLES, "targets": ["lm_head", "o_proj"]})
    ranks(world_size)(checks.check_scores, recipe=recipe, metrics=METRICS)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_with_activation_checkpointing(ranks, tiny, tmp_path, world_size, checkpointing):
    train = {"activation_checkpointing": checkpointing}
    recipe = make_recipe(tiny, tmp_path, mask=SAMPLES, train=train)
    ranks(world_size)(checks.check_scores, recipe=recipe, metrics=["gradient", "fisher"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_interrupted_scoring_restores_the_weights(ranks, checkpoints, tmp_path, world_size):
    recipe = make_recipe(checkpoints, tmp_path, "rich", mask=SAMPLES)
    ranks(world_size)(checks.check_interrupted, recipe=recipe)


def test_grasp_refuses_a_flat_loss(ranks, tiny, tmp_path):
    messages = ranks(2)(checks.check_zero_gradient, recipe=make_recipe(tiny, tmp_path))
    assert all("the calibration gradient is zero" in message for message in messages), messages


ALL = {metric: {"salience": metric} for metric in [*METRICS, "grasp", "random"]}


def at_every_world_size(ranks, check, **arguments) -> list[dict]:
    """The answers of every rank of 1, of 2 and of 4."""
    return [answer for world_size in (1, 2, 4) for answer in ranks(world_size)(check, **arguments)]


def test_scores_have_the_same_bits_at_every_world_size(ranks, checkpoints, tmp_path):
    """Batches are dealt and summed in one order, whoever computes them."""
    recipe = make_recipe(checkpoints, tmp_path, "rich", mask=SAMPLES)
    answers = at_every_world_size(ranks, checks.check_bits, recipe=recipe, changes=ALL)
    for metric in ALL:
        assert len({answer[metric] for answer in answers}) == 1, metric
    assert len(set(answers[0].values())) == len(ALL)
    other_seed = recipe.model_copy(update={"seed": 4})
    (other,) = ranks(1)(checks.check_bits, recipe=other_seed, changes={"random": ALL["random"]})
    assert other["random"] != answers[0]["random"]


UNITS = {
    f"{salience} {granularity} {budget}": {
        "salience": salience,
        "granularity": granularity,
        "budget": budget,
        "block_size": 6,
    }
    for salience in ("gradient", "fisher")
    for granularity in ("block", "row", "column")
    for budget in ("global", "per_layer")
}
ROWS = {f"{salience} per_row": {"salience": salience, "budget": "per_row"} for salience in ("snip", "random")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_are_the_same_at_every_world_size(ranks, checkpoints, tmp_path, dtype):
    choices = {**ALL, **UNITS, **ROWS}
    if dtype == "bfloat16":
        choices = {name: choice for name, choice in ALL.items() if name != "grasp"}
    recipe = make_recipe(
        checkpoints, tmp_path, "rich", mask={**SAMPLES, "density": 0.2}, model={"dtype": dtype}
    )
    answers = at_every_world_size(ranks, checks.check_masks, recipe=recipe, choices=choices)
    for name in choices:
        assert len({answer[name] for answer in answers}) == 1, name
    distinct = [sha256 for name, sha256 in answers[0].items() if name != "taylor_fo"]
    assert len(set(distinct)) == len(distinct)  # `taylor_fo` has the order of `snip`


def test_calibration_rows_are_the_ones_asked_for(ranks, tiny, tmp_path):
    def masks(**mask) -> list[str]:
        recipe = make_recipe(tiny, tmp_path, mask={**SAMPLES, **mask})  # its seed is 3
        return ranks(2)(checks.check_calibration, recipe=recipe)[0]

    same_rows, other_rows = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    shutil.copy(tiny["data"], same_rows)
    other_rows.write_text("".join(f'{{"prompt": "{i}", "response": "{i}"}}\n' for i in range(13)))
    first = masks()
    assert first[0] != first[1]
    assert masks(calibration_seed=3) == first and masks(calibration_path=str(same_rows)) == first
    assert masks(calibration_seed=4)[0] not in first
    elsewhere = masks(calibration_path=str(other_rows))
    assert elsewhere[0] not in first
    assert masks(calibration_samples=12)[0] not in first
