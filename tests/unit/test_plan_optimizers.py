"""What a plan says of each optimizer's state, against the bytes that it allocates, and by hand."""

import pytest
import torch
from tiny import make_model
from torch import nn

from speft_ds.config.recipe import Recipe
from speft_ds.plan.geometry import read_geometry
from speft_ds.plan.memory import MOMENT_BLOCK, Setup, optimizer_state, state
from speft_ds.sparse.optim.blockwise import BLOCK
from speft_ds.sparse.optim.make import make_optimizer

PERIODIC = {"schedule": "periodic", "update_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def setup_of(model, world_size=3, device="cpu", mask=None, **optimizer):
    values = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "mask": {"num_trainable": 1501, **(mask or {})},
        "optimizer": optimizer,
        "train": {"global_batch": 12, "micro_batch": 2},
    }
    recipe = Recipe.model_validate(values)
    return Setup(recipe, read_geometry(recipe), {"stage": 3}, world_size, device)


def sizes(lines):
    return {line.kind: line.num_bytes for line in lines}


OWN = 501  # 1501 / 3, rounded up: two blocks of 256
MOMENTS = 2 * 512 + 2 * 2 * 4  # codes, absmax
BY_HAND = {
    "adamw": ({}, {}, {"Adam moments": 8 * OWN}),
    "adamw with entry_steps": ({}, {"layer_gate": "half"}, {"Adam moments": 8 * OWN, "entry_steps": 4 * OWN}),
    "adamw_8bit": ({}, {}, {"8-bit Adam moments": MOMENTS}),
    "adamw_8bit with entry_steps": (
        {},
        {"schedule": "grad_topk"},
        {"8-bit Adam moments": MOMENTS, "entry_steps": 4 * OWN},
    ),
    "paged_adamw_8bit with slots": (
        {},
        PERIODIC,
        {"8-bit Adam moments": MOMENTS, "slots": 4 * 512, "entry_steps": 4 * OWN},
    ),
    "sgd": ({}, PERIODIC, {}),
    "sgd with momentum": ({"momentum": 0.9}, PERIODIC, {"momentum": 4 * OWN}),
    "lion": ({}, PERIODIC, {"Lion's average": 4 * OWN}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_state_by_hand(model, case):
    keys, mask, expected = BY_HAND[case]
    setup = setup_of(model, mask=mask, name=case.partition(" ")[0], **keys)
    assert sizes(optimizer_state(setup, "")) == expected
    assert expected.items() <= sizes(state(setup)).items()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "lion"])
@pytest.mark.parametrize("changes", [False, True])
def test_the_state_is_what_is_allocated(model, name, changes):
    keys = {"momentum": 0.5} if name == "sgd" else {}
    setup = setup_of(model, mask=PERIODIC if changes else {}, name=name, **keys)
    optimizer = make_optimizer(nn.Parameter(torch.zeros(OWN)), setup.recipe.optimizer, entry_steps=changes)
    if changes:  # the same entries again
        optimizer.remap_state(
            nn.Parameter(torch.zeros(OWN)), torch.arange(OWN), torch.ones(OWN, dtype=torch.bool)
        )
    tensors = [value for value in optimizer.state[optimizer.delta].values() if value.dim()]
    for moment in getattr(optimizer, "moments", {}).values():
        tensors += [moment.code, moment.absmax]
    if getattr(optimizer, "entry_at", None) is not None:
        tensors.append(optimizer.entry_at)
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert allocated == sum(sizes(optimizer_state(setup, "")).values())


def test_paged_moments_say_where_they_go(model):
    on_gpu = optimizer_state(setup_of(model, device="cuda", name="paged_adamw_8bit"), "")
    assert "on the host where the GPU is full" in on_gpu[0].formula
    assert "host" not in optimizer_state(setup_of(model, name="paged_adamw_8bit"), "")[0].formula


def test_the_plan_knows_the_size_of_a_block():
    assert MOMENT_BLOCK == BLOCK  # plans import no torch
