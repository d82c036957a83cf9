"""References of the methods: plain autograd and torch's AdamW in one process."""

from __future__ import annotations

import torch

from distributed.reference import (
    DenseRun,
    assert_as_dense,
    finished_run,
    plain_model,
    start,
    whole_weights,
)
from speft_ds.adapter.apply import apply_adapter
from speft_ds.adapter.format import Adapter


class DenseMethod(DenseRun):
    """A run whose whole weights are trained by autograd and the optimizer as they are, beside the mask."""

    def __init__(self, trainer, **how):
        whole = {name: torch.arange(target.numel) for name, target in trainer.context.whole.items()}
        super().__init__(trainer, picked=trainer.mask.index | whole, whole=set(whole), **how)


class SampledRun(DenseMethod):
    """The same where the weights that are open differ from step to step; moments go when a weight closes."""

    def __init__(self, trainer, is_open: list[set[str]]):
        self.is_open, self.optimizers = is_open, {}
        super().__init__(trainer)

    def _step(self, step: int) -> None:
        settings = self.settings
        warm = (step + 1) / (settings.warmup_steps + 1)
        decay = 1 - (step - settings.warmup_steps) / (self.steps - settings.warmup_steps)
        self.model.zero_grad()
        loss = self.loss_of(step)
        loss.backward()
        self.losses.append(loss.item())
        names = self.is_open[step]
        weights = [self.weights[name] for name in names]
        self.norms.append(torch.nn.utils.clip_grad_norm_(weights, settings.clip_norm).item())
        how = {"betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}
        for name in names:
            if name not in self.optimizers:
                self.optimizers[name] = torch.optim.AdamW([self.weights[name]], **how)
        self.optimizers = {name: self.optimizers[name] for name in names}
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = settings.lr * min(warm, decay)
            optimizer.step()


def check_against_autograd(recipe):
    """Losses, norms and weights of a run are those of plain autograd."""
    trainer = start(recipe)
    before = whole_weights(trainer.engine.module)
    lines, is_open = [], []
    for step in range(recipe.train.steps):
        lines.append(trainer.train_step(step))
        is_open.append(set(trainer.state.whole))
    after = whole_weights(trainer.engine.module)
    if recipe.method.name in ("lisa", "half"):
        assert_as_dense(trainer, lines, lambda trainer: SampledRun(trainer, is_open))
    else:
        assert_as_dense(trainer, lines, DenseMethod)
    return {
        "moved": {name for name in after if not torch.equal(after[name], before[name])},
        "whole": set(trainer.context.whole),
        "open": is_open,
        "num_entries": trainer.mask.num_trainable,
        "num_local": trainer.state.num_local,
    }


def check_adapter(recipe):
    """The base with the adapter, in a plain process, is the trained model bit for bit; then it comes off."""
    trainer, trained = finished_run(recipe)
    model = plain_model(recipe)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    apply_adapter(model, trainer.folder / "adapter")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name]), name
    assert any(not torch.equal(trained[name], weight) for name, weight in before.items())
    adapter = Adapter.open(trainer.folder / "adapter")
    return {"whole": set(adapter.whole), "num_entries": adapter.num_entries}
