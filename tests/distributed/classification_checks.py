"""Sequence classification on the ranks, against ordinary autograd on a plain `transformers` classifier."""

from __future__ import annotations

from pathlib import Path

import torch

from distributed.reference import make_trainer, whole_weights
from speft_ds.adapter.apply import apply_adapter
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe

HEAD = "score.weight"


def plain_classifier(recipe: Recipe, num_classes: int):
    from transformers import AutoModelForSequenceClassification

    dtype = getattr(torch, recipe.model.dtype)
    return AutoModelForSequenceClassification.from_pretrained(
        recipe.model.name_or_path, dtype=dtype, num_labels=num_classes
    ).eval()


def row_logits(model, ids: list[int]) -> torch.Tensor:
    """[classes] logits of one row by itself, unpadded: at its last token."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state
    return model.score(hidden[0, -1])


def check_dense_reference(recipe: Recipe) -> None:
    """A run equals autograd with the gradient masked to the mask and the whole head, row by row."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    start = whole_weights(trainer.engine.module)
    metrics = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trained = whole_weights(trainer.engine.module)

    model = plain_classifier(recipe, len(trainer.context.data.classes))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights[HEAD].copy_(start[HEAD])
    for name, weight in weights.items():
        assert torch.equal(weight, start[name]), name
    picked = {name: index.to(torch.int64) for name, index in trainer.mask.index.items()}
    picked[HEAD] = torch.arange(weights[HEAD].numel())
    begin = {name: weights[name].detach().clone().view(-1) for name in picked}
    deltas = {name: torch.zeros(index.numel(), requires_grad=True) for name, index in picked.items()}
    settings, batch = recipe.optimizer, recipe.train.global_batch
    optimizer = torch.optim.AdamW(deltas.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    for step, logged in enumerate(metrics):
        optimizer.param_groups[0]["lr"] = logged["lr"]
        model.zero_grad()
        rows = [trainer.rows[number] for number in trainer.order.ids(step * batch, batch)]
        logits = torch.stack([row_logits(model, row.ids) for row in rows])
        labels = torch.tensor([row.label for row in rows])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        assert abs(loss.item() - logged["loss"]) < 1e-5, (step, loss.item(), logged["loss"])
        assert logged["accuracy"] == (logits.argmax(-1) == labels).float().mean().item()
        for name, delta in deltas.items():
            delta.grad = weights[name].grad.view(-1)[picked[name]].clone()
        torch.nn.utils.clip_grad_norm_(deltas.values(), settings.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for name, delta in deltas.items():
                flat = begin[name].clone()
                flat[picked[name]] += delta
                weights[name].copy_(flat.view_as(weights[name]))
    for name, weight in weights.items():
        assert torch.allclose(trained[name], weight, atol=1e-5), (name, (trained[name] - weight).abs().max())
    assert not torch.equal(trained[HEAD], start[HEAD])
    others = [name for name in start if name not in picked]
    assert others and all(torch.equal(trained[name], start[name]) for name in others)


def check_run(recipe: Recipe) -> dict:
    """Losses, head and logits of a run; base + adapter = the trained weights, bit for bit."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    start = whole_weights(trainer.engine.module)[HEAD]
    losses = [trainer.train_step(step)["loss"] for step in range(recipe.train.steps)]
    trainer.save()
    collectives.barrier()
    trained = whole_weights(trainer.engine.module)
    model = apply_adapter(
        plain_classifier(recipe, len(trainer.context.data.classes)), trainer.folder / "adapter"
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert model.config.id2label == dict(enumerate(trainer.context.data.classes))
    return {
        "losses": losses,
        "start": start,
        "head": trained[HEAD],
        "fingerprint": trainer.context.fingerprint,
        "sha256": trainer.mask.sha256,
        "moved": int((trained[HEAD] != start).sum()),
        "changes": len(trainer.schedule.changes),
    }


def make_rows(folder: Path) -> Path:
    """Rows of two classes and unequal length, as CSV."""
    path = folder / "reviews.csv"
    good, bad = ["fine", "lovely", "a joy to see"], ["dull", "a bore", "bad and much too long"]
    lines = [f"{text} {i},{int(text in good)}\n" for i in range(8) for text in (*good, *bad)]
    path.write_text("sentence,label\n" + "".join(lines), encoding="utf-8")
    return path
