"""The dense, single-process run that the checks compare with, and what both sides need."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from ranks import Accelerator
from tiny import recipe_values
from torch import Tensor

from speft_ds.adapter.format import Adapter
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.collate import collate
from speft_ds.model.codecs import codec
from speft_ds.model.kinds.quantised import QuantisedLinear
from speft_ds.training.checkpoint.resume import Start
from speft_ds.training.run_data import load_data
from speft_ds.training.trainer import Trainer

SGD = {"name": "sgd", "momentum": 0.9, "lr": 0.5, "weight_decay": 0.1}
LION = {"name": "lion", "lr": 1e-3, "weight_decay": 0.1}
ADAMW_8BIT = {"name": "adamw_8bit", "weight_decay": 0.1, "eps": 1e-5}

Dense = dict[str, Tensor]  # weight -> a tensor of its shape


def make_recipe(tiny: dict, output_dir: Path, checkpoint: str = "untied", **sections: dict) -> Recipe:
    """A short fp32 recipe on a tiny checkpoint; `sections` override whole keys of its sections."""
    sections["optimizer"] = {"clip_norm": 0.5, "warmup_steps": 2, **sections.get("optimizer", {})}
    sections["train"] = {"steps": 5, **sections.get("train", {})}
    sections["deepspeed"] = {"config": Accelerator.find().ds_config, **sections.get("deepspeed", {})}
    values = recipe_values(tiny, checkpoint, **sections)
    return Recipe.model_validate({**values, "output_dir": str(output_dir), "seed": 3})


def read_entries(run: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> indices and deltas of the adapter of a run."""
    adapter = Adapter.open(run / "adapter")
    return {name: adapter.entries(name) for name in adapter.names}


def make_trainer(recipe: Recipe, begin: Start | None = None) -> Trainer:
    trainer = Trainer(recipe, begin)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    return trainer


def start(recipe: Recipe, begin: Start | None = None) -> Trainer:
    """A run that is about to make its first step."""
    trainer = make_trainer(recipe, begin)
    trainer.choose_mask()
    trainer.engine.train()  # in which alone transformers checkpoints activations
    return trainer


def whole_weights(model) -> Dense:
    """Copies of all gathered weights, on every rank, on the CPU; in few bits, with what is trained."""
    import deepspeed

    in_few_bits = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in in_few_bits or name.endswith(".bias")
    }
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        found = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    return found | {f"{name}.weight": linear.live_weight().cpu() for name, linear in in_few_bits.items()}


def whole_entries(trainer: Trainer, own: Tensor) -> dict[str, Tensor]:
    """A number for each of this rank's entries -> those of all ranks, by weight, in the order of the mask.

    On the CPU, where all that is compared with a reference is.
    """
    layout = trainer.state.layout
    by_rank = collectives.all_gather_padded(own, layout.lengths)
    return {
        name: torch.cat([values[layout.places(name, rank)] for rank, values in enumerate(by_rank)]).cpu()
        for name in trainer.mask.shape
    }


def evaluated_weights(recipe: Recipe, adapter: Path) -> Dense:
    """The weights that an evaluation of a finished run scores."""
    from speft_ds.jobs.evaluate import load_scored  # late: lm-eval takes memory, which others measure

    return whole_weights(load_scored(recipe, load_data(recipe), adapter).engine.module)


def finished_run(recipe: Recipe) -> tuple[Trainer, Dense]:
    """A run with its adapter, and the weights that it trained, which are those that an evaluation scores."""
    trainer = start(recipe)
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    trainer.save()
    collectives.barrier()
    trained = whole_weights(trainer.engine.module)
    for name, weight in evaluated_weights(recipe, trainer.folder / "adapter").items():
        assert torch.equal(weight, trained[name]), name
    return trainer, trained


def plain_model(recipe: Recipe):
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, recipe.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=dtype)
    if recipe.model.base_format is not None:
        through_codec(model, recipe.model.base_format)
    return model


@torch.no_grad()
def through_codec(model, base_format: str) -> None:
    """Give the linears of the decoder layers the values that a base in few bits has."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.copy_(codec(base_format).round_trip(module.weight))


def rows_of(trainer: Trainer, step: int) -> list:
    """The rows of a step's global batch."""
    global_batch = trainer.recipe.train.global_batch
    return [trainer.rows[i] for i in trainer.order.ids(step * global_batch, global_batch)]


def batch_of(trainer: Trainer, step: int) -> dict:
    """The whole global batch of a step in one padded batch on the CPU, as a single process would run it."""
    return collate(rows_of(trainer, step), trainer.context.data.pad_id, torch.device("cpu"))


def reference_loss(model, batch: dict) -> Tensor:
    """Mean token loss by `transformers`' own loss, from an unrelated code path."""
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


class DenseRun:
    """A recipe's run by ordinary autograd on a plain model: dense gradients, masked to the same entries.

    Clipping and AdamW are torch's. Of the product it takes the rows and the mask.

    Args:
        loss_of: the loss of step 0, 1, ... of the whole model; the default is the mean token loss.
        picked: weight -> flat indices of what is trained; the default is the mask.
        whole: names of weights whose values are trained, not their differences.
        start: weight -> deltas that the model has already; the default is none.
    Attributes:
        losses, norms: by step. clipped, kept: how many groups were clipped, and were not, in all steps.
        weights: after the last step.
    """

    def __init__(
        self,
        trainer: Trainer,
        model=None,
        loss_of: Callable[[int], Tensor] | None = None,
        picked: dict[str, Tensor] | None = None,
        whole: Collection[str] = (),
        start: Dense | None = None,
    ):
        self.settings, self.steps = trainer.recipe.optimizer, trainer.recipe.train.steps
        self.model = model or plain_model(trainer.recipe)
        self.loss_of = loss_of or (lambda step: reference_loss(self.model, batch_of(trainer, step)))
        self.weights = dict(self.model.named_parameters())
        self.picked = {n: i.to("cpu", torch.int64) for n, i in (picked or trainer.mask.index).items()}
        self.pretrained = {name: self.weights[name].detach().clone() for name in self.picked}
        self.delta = {n: torch.zeros(i.numel(), requires_grad=True) for n, i in self.picked.items()}
        for name, delta in (start or {}).items():
            self.delta[name] = delta.clone().requires_grad_()
            self.pretrained[name].view(-1)[self.picked[name]] -= delta
        for name in whole:  # whose values are trained themselves, from 0 on
            self.delta[name] = self.pretrained[name].flatten().requires_grad_()
            self.pretrained[name] = torch.zeros_like(self.pretrained[name])
        self.average = {name: torch.zeros(index.numel()) for name, index in self.picked.items()}  # Lion's
        self.optimizer = self._torchs()
        self.losses, self.norms, self.clipped, self.kept = [], [], 0, 0
        for step in range(self.steps):
            self._step(step)

    def _torchs(self) -> torch.optim.Optimizer | None:
        s, deltas = self.settings, list(self.delta.values())
        if s.name == "adamw":
            return torch.optim.AdamW(deltas, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay)
        return torch.optim.SGD(deltas, momentum=s.momentum) if s.name == "sgd" else None

    def _step(self, step: int) -> None:
        warm = (step + 1) / (self.settings.warmup_steps + 1)
        decay = 1 - (step - self.settings.warmup_steps) / (self.steps - self.settings.warmup_steps)
        self.model.zero_grad()
        loss = self.loss_of(step)
        loss.backward()
        self.losses.append(loss.item())
        for name, delta in self.delta.items():
            delta.grad = self.weights[name].grad.view(-1)[self.picked[name]].clone()
        self.norms.append(torch.cat([delta.grad for delta in self.delta.values()]).norm().item())
        self._clip()
        self._advance(self.settings.lr * min(warm, decay))
        with torch.no_grad():
            for name, delta in self.delta.items():
                self.weights[name].view(-1)[self.picked[name]] = (
                    self.pretrained[name].view(-1)[self.picked[name]] + delta
                )

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
        if self.settings.name != "adamw":
            for delta in self.delta.values():
                delta -= lr * self.settings.weight_decay * delta
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            return
        beta1, beta2 = self.settings.betas
        for name, delta in self.delta.items():
            average = self.average[name]
            delta -= lr * torch.sign(beta1 * average + (1 - beta1) * delta.grad)
            self.average[name] = beta2 * average + (1 - beta2) * delta.grad


def assert_as_dense(
    trainer: Trainer, lines: list[dict], make_reference: Callable[[Trainer], DenseRun] = DenseRun
) -> DenseRun | None:
    """The steps' metrics and the weights after them are the reference's, to 1e-5 (fp32).

    Rank 0 computes the reference, returns it, and compares the weights that are gathered from all ranks.
    """
    trained = whole_weights(trainer.engine.module)
    if collectives.rank() != 0:
        return None
    reference = make_reference(trainer)
    for line, loss, norm in zip(lines, reference.losses, reference.norms, strict=True):
        assert abs(line["loss"] - loss) < 1e-5, (line, reference.losses)
        assert abs(line["grad_norm"] - norm) < 1e-4 * norm, (line, reference.norms)
    for name, weight in reference.weights.items():
        assert torch.allclose(trained[name], weight, atol=1e-5), (name, (trained[name] - weight).abs().max())
    assert lines[0]["loss"] != lines[-1]["loss"], "nothing was learnt"
    return reference
