"""Scores of the weights against dense ones in one process, and what scoring leaves behind: nothing."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed.salience_checks import (
    OF_GRADIENT,
    check_bits,
    check_calibration,
    check_interrupted,
    check_masks,
    check_scores,
    check_zero_gradient,
)

METRICS = [*OF_GRADIENT, "fisher", "wanda", "magnitude", "low_magnitude", "synflow", "lift"]
# In batches of 3: on 2 and 4 ranks some get a filler, and the last batch is short.
SAMPLES = {"calibration_samples": 13, "calibration_batch": 3}


@pytest.fixture(scope="session", autouse=True)
def rich(tiny):
    """A checkpoint more: biases, norm weights of both signs, zeros of both signs in every matrix."""
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
    tiny["rich"] = folder


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_are_the_dense_ones(ranks, recipe, world_size):
    ranks(world_size)(check_scores, recipe=recipe("rich", mask=SAMPLES), metrics=METRICS)


@pytest.mark.parametrize("world_size", [1, 2])
def test_scores_of_a_base_in_few_bits(ranks, recipe, world_size):
    """Those of the decoded weights."""
    made = recipe("rich", mask={**SAMPLES, "salience": "quant_error"}, model={"base_format": "bfp6"})
    ranks(world_size)(check_scores, recipe=made, metrics=[*METRICS, "grasp", "quant_error"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("checkpoint", ["untied", "rich"])
def test_grasp_has_the_exact_hessian(ranks, recipe, world_size, checkpoint):
    ranks(world_size)(check_scores, recipe=recipe(checkpoint, mask=SAMPLES), metrics=["grasp"])


@pytest.mark.parametrize("checkpoint", ["tied", "bias"])
def test_scores_of_other_checkpoints(ranks, recipe, checkpoint):
    metrics = [*OF_GRADIENT, "fisher", "synflow"]
    ranks(2)(check_scores, recipe=recipe(checkpoint, mask=SAMPLES), metrics=metrics)


@pytest.mark.parametrize("world_size", [2, 4])
def test_scores_of_the_head(ranks, recipe, world_size):
    """It sees the hidden states of the labels alone."""
    mask = {**SAMPLES, "targets": ["lm_head", "o_proj"]}
    ranks(world_size)(check_scores, recipe=recipe(mask=mask), metrics=METRICS)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_with_activation_checkpointing(ranks, recipe, world_size, checkpointing):
    made = recipe(mask=SAMPLES, train={"activation_checkpointing": checkpointing})
    ranks(world_size)(check_scores, recipe=made, metrics=["gradient", "fisher"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_interrupted_scoring_restores_the_weights(ranks, recipe, world_size):
    ranks(world_size)(check_interrupted, recipe=recipe("rich", mask=SAMPLES))


def test_grasp_refuses_a_flat_loss(ranks, recipe):
    messages = ranks(2)(check_zero_gradient, recipe=recipe())
    assert all("the calibration gradient is zero" in message for message in messages), messages


ALL = {metric: {"salience": metric} for metric in [*METRICS, "grasp", "random"]}


def at_every_world_size(ranks, check, **arguments) -> list[dict]:
    """The answers of every rank of 1, of 2 and of 4, as far as there are so many."""
    sizes = [size for size in (1, 2, 4) if not ranks.why_not(size)]
    return [answer for size in sizes for answer in ranks(size)(check, **arguments)]


def test_scores_have_the_same_bits_at_every_world_size(ranks, recipe):
    """Batches are dealt and summed in one order, whoever computes them."""
    made = recipe("rich", mask=SAMPLES)
    answers = at_every_world_size(ranks, check_bits, recipe=made, changes=ALL)
    for metric in ALL:
        assert len({answer[metric] for answer in answers}) == 1, metric
    assert len(set(answers[0].values())) == len(ALL)
    other_seed = made.model_copy(update={"seed": 4})
    (other,) = ranks(1)(check_bits, recipe=other_seed, changes={"random": ALL["random"]})
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
def test_masks_are_the_same_at_every_world_size(ranks, recipe, dtype):
    choices = {**ALL, **UNITS, **ROWS}
    if dtype == "bfloat16":
        choices = {name: choice for name, choice in ALL.items() if name != "grasp"}
    made = recipe("rich", mask={**SAMPLES, "density": 0.2}, model={"dtype": dtype})
    answers = at_every_world_size(ranks, check_masks, recipe=made, choices=choices)
    for name in choices:
        assert len({answer[name] for answer in answers}) == 1, name
    distinct = [sha256 for name, sha256 in answers[0].items() if name != "taylor_fo"]
    assert len(set(distinct)) == len(distinct)  # `taylor_fo` has the order of `snip`


def test_calibration_rows_are_the_ones_asked_for(ranks, recipe, tiny, tmp_path):
    def masks(**mask) -> list[str]:
        return ranks(2)(check_calibration, recipe=recipe(mask={**SAMPLES, **mask}))[0]  # its seed is 3

    same_rows, other_rows = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    shutil.copy(tiny["data"], same_rows)
    other_rows.write_text("".join(f'{{"prompt": "{i}", "response": "{i}"}}\n' for i in range(13)))
    first = masks()
    assert first[0] != first[1]
    assert masks(calibration_seed=3) == first and masks(calibration_path=str(same_rows)) == first
    assert masks(calibration_seed=4)[0] not in first
    assert masks(calibration_path=str(other_rows))[0] not in first
    assert masks(calibration_samples=12)[0] not in first
