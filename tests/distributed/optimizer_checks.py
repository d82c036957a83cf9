"""What the tests of optimizers, clipping and offload run on every rank."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from safetensors.torch import load_file
from torch import Tensor

from distributed.checks import check_losses, check_write_through
from distributed.reference import batch_of, make_trainer, plain_model, reference_loss, whole_weights
from speft_ds.config.recipe import Recipe
from speft_ds.training.trainer import Trainer


def check_dense(recipe: Recipe) -> dict:
    """The run equals ordinary autograd on a plain model with a textbook optimizer.

    Returns:
        `clipped`: how many groups were clipped, `kept`: how many were not, over all steps; `losses`.
    """
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    trained = whole_weights(trainer.engine.module)
    reference = DenseRun(recipe, trainer)
    for line, loss, norm in zip(lines, reference.losses, reference.norms, strict=True):
        assert abs(line["loss"] - loss) < 1e-5, (line, reference.losses)
        assert abs(line["grad_norm"] - norm) < 1e-4 * norm, (line, reference.norms)
    for name, weight in reference.weights.items():
        assert torch.allclose(trained[name], weight, atol=1e-5), (name, (trained[name] - weight).abs().max())
    return {"clipped": reference.clipped, "kept": reference.kept, "losses": reference.losses}


class DenseRun:
    """A recipe's run with dense gradients, on one process; of the product it takes rows and mask."""

    def __init__(self, recipe: Recipe, trainer: Trainer):
        self.settings, self.steps = recipe.optimizer, recipe.train.steps
        self.model = plain_model(recipe)
        self.weights = dict(self.model.named_parameters())
        self.picked = {name: index.to(torch.int64) for name, index in trainer.mask.index.items()}
        self.pretrained = {name: self.weights[name].detach().clone() for name in self.picked}
        self.delta = {n: torch.zeros(i.numel(), requires_grad=True) for n, i in self.picked.items()}
        self.average = {name: torch.zeros(index.numel()) for name, index in self.picked.items()}  # Lion's
        self.optimizer = self._torchs()
        self.losses, self.norms, self.clipped, self.kept = [], [], 0, 0
        for step in range(self.steps):
            self._step(step, batch_of(trainer, step))

    def _torchs(self) -> torch.optim.Optimizer | None:
        s, deltas = self.settings, list(self.delta.values())
        if s.name == "adamw":
            return torch.optim.AdamW(deltas, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay)
        return torch.optim.SGD(deltas, momentum=s.momentum) if s.name == "sgd" else None

    def _step(self, step: int, batch: dict) -> None:
        warm = (step + 1) / (self.settings.warmup_steps + 1)
        decay = 1 - (step - self.settings.warmup_steps) / (self.steps - self.settings.warmup_steps)
        lr = self.settings.lr * min(warm, decay)
        self.model.zero_grad()
        loss = reference_loss(self.model, batch)
        loss.backward()
        self.losses.append(loss.item())
        for name, delta in self.delta.items():
            delta.grad = self.weights[name].grad.view(-1)[self.picked[name]].clone()
        gradients = [delta.grad for delta in self.delta.values()]
        self.norms.append(torch.cat(gradients).norm().item())
        self._clip()
        self._advance(lr)
        with torch.no_grad():
            for name, delta in self.delta.items():
                trained = self.pretrained[name].clone().view(-1)
                trained[self.picked[name]] += delta
                self.weights[name].copy_(trained.view_as(self.weights[name]))

    def _clip(self) -> None:
        groups: dict[str, list[Tensor]] = {}
        for name, delta in self.delta.items():
            layer = re.search(r"layers\.(\d+)\.", name)
            layer = layer[1] if layer else name
            key = {"global": "", "per_layer": layer, "per_component": name}[self.settings.clip]
            groups.setdefault(key, []).append(delta)
        for deltas in groups.values():
            before = torch.nn.utils.clip_grad_norm_(deltas, self.settings.clip_norm)
            is_clipped = bool(before > self.settings.clip_norm)
            self.clipped, self.kept = self.clipped + is_clipped, self.kept + (not is_clipped)

    @torch.no_grad()
    def _advance(self, lr: float) -> None:
        decay = self.settings.weight_decay
        if self.settings.name == "adamw":
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            return
        for delta in self.delta.values():
            delta -= lr * decay * delta
        if self.settings.name == "sgd":
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            return
        beta1, beta2 = self.settings.betas
        for name, delta in self.delta.items():
            average = self.average[name]
            delta -= lr * torch.sign(beta1 * average + (1 - beta1) * delta.grad)
            self.average[name] = beta2 * average + (1 - beta2) * delta.grad


def own_storage(checkpoint: Path) -> list[dict[str, Tensor]]:
    """What each rank's optimizer wrote for itself."""
    parts = [load_file(path) for path in sorted(checkpoint.glob("part_*.safetensors"))]
    return [{n: v for n, v in part.items() if n.startswith("own.optimizer.")} for part in parts]


def check_note(recipe: Recipe) -> str:
    """What a rank prints when the trainable state is set up, and set up again by a change of the mask."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = make_trainer(recipe)
        trainer.choose_mask()
        for step in range(recipe.train.steps):
            trainer.train_step(step)
    assert trainer.schedule.changes
    return output.getvalue()


def check_offloaded(recipe: Recipe) -> dict:
    """Losses and norms of a run whose shards are kept by DeepSpeed's offload."""
    trainer = make_trainer(recipe)
    assert trainer.engine.optimizer.offload.offload_device == OffloadDeviceEnum.cpu
    check_write_through(recipe)
    return check_losses(recipe)
