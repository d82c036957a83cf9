"""What a plan says of each optimizer's state, against the bytes that it allocates."""

import pytest
import torch
from torch import nn

from speft_ds.sparse.optim.blockwise import BLOCK
from speft_ds.sparse.optim.optimizers import make_optimizer
from speft_ds.tools.plan.geometry import read_geometry
from speft_ds.tools.plan.memory_model import MOMENT_BLOCK, Setup, optimizer_state, total

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


def test_the_plan_knows_the_size_of_a_block():
    assert MOMENT_BLOCK == BLOCK  # plans import no torch
