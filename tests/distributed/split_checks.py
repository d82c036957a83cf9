"""One global batch, split over ranks, micro-batches and accumulation steps in every way."""

from __future__ import annotations

import torch

from distributed.reference import make_trainer, plain_model, reference_loss
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate


def first_step(recipe: Recipe) -> dict:
    """Loss, lengths and whole sparse gradient of the first step, before clipping, on every rank."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    seen = []
    trainer.engine.optimizer.trained.on_gradient = lambda gradient: seen.append(gradient.clone())
    logged = trainer.train_step(0)
    (gradient,), state = seen, trainer.state
    by_rank = collectives.all_gather_padded(gradient, state.layout.lengths)
    whole = {
        name: torch.cat(
            [by_rank[r][state.layout.places(name, r)] for r in range(state.rank_shards.world_size)]
        )
        for name in trainer.mask.shape
    }
    rows = [trainer.rows[number] for number in trainer.order.ids(0, recipe.train.global_batch)]
    return {
        "loss": logged["loss"],
        "num_tokens": logged["num_tokens"],
        "lengths": [len(row.ids) for row in rows],
        "rows_in_sequence": [len(row.starts) for row in rows],
        "gradient": whole,
    }


def dense_step(recipe: Recipe) -> dict:
    """The same by ordinary autograd, on the rows one by one: no padding, no packing."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    model = plain_model(recipe)
    weights = dict(model.named_parameters())
    rows = [trainer.rows[number] for number in trainer.order.ids(0, recipe.train.global_batch)]
    num_labels, total = sum(row.num_labels for row in rows), 0.0
    for row in rows:
        for start, stop in zip(row.starts, [*row.starts[1:], len(row.ids)], strict=True):
            single = type(row)(row.ids[start:stop], row.loss_mask[start:stop])
            batch = collate([single], trainer.context.data.pad_id, torch.device("cpu"))
            loss = reference_loss(model, batch) * single.num_labels / num_labels
            loss.backward()
            total += loss.item()
    picked = {name: index.to(torch.int64) for name, index in trainer.mask.index.items()}
    gradient = {name: weights[name].grad.view(-1)[index] for name, index in picked.items()}
    return {"loss": total, "gradient": gradient}
