"""What each rank does in the tests of the stash, and a reference of its own."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from distributed.checkpoint_checks import run_piece
from distributed.checks import result_of
from distributed.reference import DenseRun, assert_as_dense, batch_of, plain_model, reference_loss, start
from speft_ds.config.recipe import Recipe
from speft_ds.training import stash_format
from speft_ds.training.trainer import Trainer


def rounded(x: Tensor, bits: int) -> Tensor:
    """Block floating point by ordinary arithmetic: 16 neighbours, the exponent of the largest of them."""
    columns = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -columns % 16)).double().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    step = 2.0 ** (largest.log2().floor() - (bits - 2))
    limit = 2 ** (bits - 1) - 1
    return ((blocks / step).round().clamp(-limit, limit) * step).flatten(-2)[..., :columns].to(x.dtype)


class FromRounded(torch.autograd.Function):
    """A layer whose backward starts from its input in few bits."""

    @staticmethod
    def forward(ctx, x, run, bits):
        ctx.x, ctx.run, ctx.bits = x.detach(), run, bits
        return run(x)

    @staticmethod
    def backward(ctx, grad_y):
        with torch.enable_grad():
            x = rounded(ctx.x, ctx.bits).requires_grad_()
            ctx.run(x).backward(grad_y)
        return x.grad, None, None


class RoundedNorm(torch.autograd.Function):
    """The last norm, which is not recomputed: its input is in few bits, its factor per token is not."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, bits):
        factor = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(rounded(x, bits), factor, weight)
        return weight * (x * factor)

    @staticmethod
    def backward(ctx, grad_y):
        x, factor, weight = ctx.saved_tensors
        grad = grad_y * weight
        of_factor = (grad * x).sum(-1, keepdim=True)
        return grad * factor - of_factor * factor**3 * x / x.shape[-1], None, None, None


def rounding_model(recipe: Recipe, bits: int):
    """A plain model of which each decoder layer, and the last norm, remembers its input in few bits."""
    model = plain_model(recipe)
    model.config.use_cache = False  # keys that a layer adds to when it runs again
    model.get_input_embeddings().register_forward_hook(lambda module, x, y: y.detach().requires_grad_())
    for module in model.model.layers:

        def run(x, forward=module.forward, **arguments):
            return FromRounded.apply(x, lambda own: forward(own, **arguments), bits)

        module.forward = run
    norm = model.model.norm
    norm.forward = lambda x: RoundedNorm.apply(x, norm.weight.detach(), norm.variance_epsilon, bits)
    return model


def check_against_rounded_layers(recipe: Recipe) -> dict:
    """Under activation checkpointing: losses, gradient norms and weights of the reference, to 1e-5."""
    trainer = start(recipe)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]

    def reference(trainer: Trainer) -> DenseRun:
        model = rounding_model(recipe, int(recipe.train.stash[-1]))
        return DenseRun(trainer, model, lambda step: reference_loss(model, batch_of(trainer, step)))

    assert_as_dense(trainer, lines, reference)
    return result_of(trainer, lines)


def check_losses(recipe: Recipe) -> dict:
    """A run, and what its stash says."""
    trainer = start(recipe)
    lines = [trainer.train_step(step) for step in range(recipe.train.steps)]
    return {
        **result_of(trainer, lines),
        "stash": [line.get("stash") for line in lines],
        "saved": trainer.stash.facts(),
        "delta": trainer.state.delta.detach().to("cpu", copy=True),
    }


def run_short_windows(recipe: Recipe, stop: int, checkpoint: Path | None = None) -> dict:
    """A piece of a run whose dynamic stash takes the next format after every four steps."""
    formats, real = [], stash_format.TrainingStash.after_step

    def watched(self, *arguments):
        formats.append(real(self, *arguments))
        return formats[-1]

    short = {"WINDOW": 2, "MIN_FALL": 1.0}
    with (
        mock.patch.multiple(stash_format, **short),
        mock.patch.object(stash_format.TrainingStash, "after_step", watched),
    ):
        made = run_piece(recipe, stop, checkpoint)
    return {**made, "formats": [each["stash"] for each in formats]}
