"""How a global batch is split over ranks, micro-batches and accumulation steps changes nothing."""

import pytest
import torch

from distributed.reference import make_recipe, plain_model, reference_loss, rows_of, start, whole_entries
from speft_ds.data.collate import collate

SPLITS = [(ranks, micro) for ranks in (1, 2, 4) for micro in (1, 2, 4, 8) if ranks * micro <= 8]


def first_step(recipe) -> dict:
    """On every rank: loss, lengths and whole sparse gradient of the first step, before clipping."""
    trainer, seen = start(recipe), []
    trainer.engine.optimizer.trained.on_gradient = lambda gradient: seen.append(gradient.clone())
    logged = trainer.train_step(0)
    (gradient,), rows = seen, rows_of(trainer, 0)
    return {
        "loss": logged["loss"],
        "num_tokens": logged["num_tokens"],
        "lengths": [len(row.ids) for row in rows],
        "rows_in_sequence": [len(row.starts) for row in rows],
        "gradient": whole_entries(trainer, gradient),
    }


def dense_step(recipe) -> dict:
    """The same by ordinary autograd, on the rows one by one: no padding, no packing."""
    trainer, model = start(recipe), plain_model(recipe)
    rows, total = rows_of(trainer, 0), 0.0
    num_labels = sum(row.num_labels for row in rows)
    for row in rows:
        for begin, end in zip(row.starts, [*row.starts[1:], len(row.ids)], strict=True):
            single = type(row)(row.ids[begin:end], row.loss_mask[begin:end])
            batch = collate([single], trainer.context.data.pad_id, torch.device("cpu"))
            loss = reference_loss(model, batch) * single.num_labels / num_labels
            loss.backward()
            total += loss.item()
    weights = dict(model.named_parameters())
    picked = {name: index.to("cpu", torch.int64) for name, index in trainer.mask.index.items()}
    gradient = {name: weights[name].grad.view(-1)[index] for name, index in picked.items()}
    return {"loss": total, "gradient": gradient}


@pytest.fixture(scope="module")
def expected(ranks, tiny, tmp_path_factory):
    """By packing: the step by ordinary autograd, row by row."""
    folder = tmp_path_factory.mktemp("dense")
    recipes = {packing: make(tiny, folder / str(packing), packing, 8) for packing in (False, True)}
    return {packing: ranks(1)(dense_step, recipe=recipe)[0] for packing, recipe in recipes.items()}


def make(tiny, folder, packing, micro_batch):
    data = {"packing": packing, "max_length": 64}
    return make_recipe(tiny, folder, data=data, train={"global_batch": 8, "micro_batch": micro_batch})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("world_size", "micro_batch"), SPLITS)
def test_loss_and_gradient(ranks, tiny, tmp_path, expected, world_size, micro_batch, packing):
    steps = ranks(world_size)(first_step, recipe=make(tiny, tmp_path / "run", packing, micro_batch))
    wanted = expected[packing]
    for step in steps:
        assert len(set(step["lengths"])) > 2  # unequal, or the test shows little
        assert (max(step["rows_in_sequence"]) > 1) == packing
        assert step["num_tokens"] == sum(step["lengths"])
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        for name, gradient in wanted["gradient"].items():
            assert torch.allclose(step["gradient"][name], gradient, atol=1e-6), name
    assert sum(float(gradient.norm()) for gradient in wanted["gradient"].values()) > 1e-2
