"""What a plan says of each optimizer's state, against the bytes that it allocates, and by hand."""

import pytest
import torch
from torch import nn

from speft_ds.optimizer import make_optimizer
from speft_ds.optimizer.blockwise import BLOCK
from speft_ds.tools.plan.geometry import read_geometry
from speft_ds.tools.plan.memory_model import MOMENT_BLOCK, Setup, optimizer_state, trained

PERIODIC = {"schedule": "periodic", "update_every": 2}
OWN = 501  # 1501 / 3, rounded up: two blocks of 256
MOMENTS = 2 * 512 + 2 * 2 * 4  # codes, absmax
BY_HAND = {
    "adamw": ({}, {}, {"Adam moments": 8 * OWN}),
    "adamw with ages": ({}, {"layer_gate": "half"}, {"Adam moments": 8 * OWN, "ages": 4 * OWN}),
    "adamw_8bit": ({}, {}, {"8-bit Adam moments": MOMENTS}),
    "adamw_8bit with ages": ({}, {"schedule": "grad_topk"}, {"8-bit Adam moments": MOMENTS, "ages": 4 * OWN}),
    "adamw_8bit with slots": (
        {},
        PERIODIC,
        {"8-bit Adam moments": MOMENTS, "slots": 4 * 512, "ages": 4 * OWN},
    ),
    "sgd": ({}, PERIODIC, {}),
    "sgd with momentum": ({"momentum": 0.9}, PERIODIC, {"momentum": 4 * OWN}),
    "lion": ({}, PERIODIC, {"Lion's average": 4 * OWN}),
}


@pytest.fixture
def setup_of(recipe):
    def make(mask: dict, **optimizer) -> Setup:
        made = recipe(mask={"num_trainable": 1501, **mask}, optimizer=optimizer)
        return Setup(made, read_geometry(made), {"stage": 3}, 3, "cpu")

    return make


def sizes(lines):
    return {line.kind: line.num_bytes for line in lines}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_state_by_hand(setup_of, case):
    keys, mask, expected = BY_HAND[case]
    setup = setup_of(mask, name=case.partition(" ")[0], **keys)
    assert sizes(optimizer_state(setup)) == expected
    assert expected.items() <= sizes(trained(setup)).items()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "lion"])
@pytest.mark.parametrize("changes", [False, True])
def test_the_state_is_what_is_allocated(setup_of, name, changes):
    keys = {"momentum": 0.5} if name == "sgd" else {}
    setup = setup_of(PERIODIC if changes else {}, name=name, **keys)
    optimizer = make_optimizer(nn.Parameter(torch.zeros(OWN)), setup.recipe.optimizer, ages=changes)
    if changes:  # the same entries again
        optimizer.carry(nn.Parameter(torch.zeros(OWN)), torch.arange(OWN), torch.ones(OWN, dtype=torch.bool))
    tensors = [value for value in optimizer.state[optimizer.delta].values() if value.dim()]
    for moment in getattr(optimizer, "moments", {}).values():
        tensors += [moment.code, moment.absmax]
    if getattr(optimizer, "entry_at", None) is not None:
        tensors.append(optimizer.entry_at)
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert allocated == sum(sizes(optimizer_state(setup)).values())


def test_the_plan_knows_the_size_of_a_block():
    assert MOMENT_BLOCK == BLOCK  # plans import no torch
