"""How a global batch is split over ranks, micro-batches and accumulation steps changes nothing."""

import pytest
import torch

from distributed import split_checks as checks
from distributed.reference import make_recipe

SPLITS = [(ranks, micro) for ranks in (1, 2, 4) for micro in (1, 2, 4, 8) if ranks * micro <= 8]


@pytest.fixture(scope="module")
def expected(ranks, tiny, tmp_path_factory):
    """By packing: the step by ordinary autograd, row by row."""
    folder = tmp_path_factory.mktemp("dense")
    recipes = {packing: make(tiny, folder / str(packing), packing, 8) for packing in (False, True)}
    return {packing: ranks(1)(checks.dense_step, recipe=recipe)[0] for packing, recipe in recipes.items()}


def make(tiny, folder, packing, micro_batch):
    data = {"packing": packing, "max_length": 64}
    return make_recipe(tiny, folder, data=data, train={"global_batch": 8, "micro_batch": micro_batch})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("world_size", "micro_batch"), SPLITS)
def test_loss_and_gradient(ranks, tiny, tmp_path, expected, world_size, micro_batch, packing):
    steps = ranks(world_size)(checks.first_step, recipe=make(tiny, tmp_path / "run", packing, micro_batch))
    wanted = expected[packing]
    for step in steps:
        assert len(set(step["lengths"])) > 2  # unequal, or the test shows little
        assert (max(step["rows_in_sequence"]) > 1) == packing
        assert step["num_tokens"] == sum(step["lengths"])
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        for name, gradient in wanted["gradient"].items():
            assert torch.allclose(step["gradient"][name], gradient, atol=1e-6), name
    assert sum(float(gradient.norm()) for gradient in wanted["gradient"].values()) > 1e-2
