"""The dense, single-process references that the checks compare with, and what both sides need.

Each rank computes the reference for itself from the plain checkpoint, with ordinary autograd.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import recipe_values

from speft_ds.adapter.format import Adapter
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.training.trainer import Trainer


def make_recipe(tiny: dict, output_dir: Path, checkpoint: str = "untied", **sections: dict) -> Recipe:
    """A short fp32 recipe on a tiny checkpoint; `sections` override whole keys of its sections."""
    sections["optimizer"] = {"clip_norm": 0.5, "warmup_steps": 2, **sections.get("optimizer", {})}
    sections["train"] = {"steps": 5, **sections.get("train", {})}
    values = recipe_values(tiny, checkpoint, **sections)
    return Recipe.model_validate({**values, "output_dir": str(output_dir), "seed": 3})


def read_entries(run: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight -> indices and deltas of the adapter of a run."""
    adapter = Adapter.open(run / "adapter")
    return {name: adapter.entries(name) for name in adapter.names}


def make_trainer(recipe: Recipe) -> Trainer:
    trainer = Trainer(recipe)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    return trainer


@contextmanager
def gathered(parameters: list):
    """The whole weights, on every rank, read only."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def whole_weights(model) -> dict[str, torch.Tensor]:
    """Clones of all gathered weights."""
    parameters = dict(model.named_parameters())
    with gathered(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def plain_model(recipe: Recipe):
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, recipe.model.dtype)
    return AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=dtype)


def batch_of(trainer: Trainer, step: int) -> dict:
    """The whole global batch of a step in one padded batch, as a single process would run it."""
    global_batch = trainer.recipe.train.global_batch
    ids = trainer.order.ids(step * global_batch, global_batch)
    return collate([trainer.rows[i] for i in ids], trainer.context.data.pad_id, torch.device("cpu"))


def reference_loss(model, batch: dict) -> torch.Tensor:
    """Mean token loss by `transformers`' own loss, from an unrelated code path."""
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def dense_reference(recipe: Recipe, trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Ordinary autograd on a plain model, gradient masked to the same entries, torch's AdamW and clipping."""
    model = plain_model(recipe)
    weights = dict(model.named_parameters())
    pretrained = {name: weights[name].detach().clone() for name in trainer.mask.shape}
    picked = {name: index.to(torch.int64) for name, index in trainer.mask.index.items()}
    deltas = {name: torch.zeros(index.numel(), requires_grad=True) for name, index in picked.items()}
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(deltas.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    losses = []
    for step in range(recipe.train.steps):
        warm = (step + 1) / (settings.warmup_steps + 1)
        decay = 1 - (step - settings.warmup_steps) / (recipe.train.steps - settings.warmup_steps)
        optimizer.param_groups[0]["lr"] = settings.lr * min(warm, decay)
        model.zero_grad()
        loss = reference_loss(model, batch_of(trainer, step))
        loss.backward()
        losses.append(loss.item())
        for name, delta in deltas.items():
            delta.grad = weights[name].grad.view(-1)[picked[name]].clone()
        torch.nn.utils.clip_grad_norm_(deltas.values(), settings.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for name, delta in deltas.items():
                trained = pretrained[name].clone().view(-1)
                trained[picked[name]] = (trained[picked[name]].float() + delta).to(trained.dtype)
                weights[name].copy_(trained.view_as(weights[name]))
    return losses, {name: parameter.detach() for name, parameter in weights.items()}


def train_like_reference(recipe: Recipe, trainer: Trainer) -> None:
    losses = [trainer.train_step(step)["loss"] for step in range(recipe.train.steps)]
    trained = whole_weights(trainer.engine.module)
    expected_losses, expected = dense_reference(recipe, trainer)
    for got, wanted in zip(losses, expected_losses, strict=True):
        assert abs(got - wanted) < 1e-5, (losses, expected_losses)
    for name, weight in expected.items():
        assert torch.allclose(trained[name], weight, atol=1e-5), (name, (trained[name] - weight).abs().max())
    assert losses[0] != losses[-1]
