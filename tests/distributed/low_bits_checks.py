"""What runs on every rank, of scores in few bits: each check beside weights that were replaced by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distributed.evaluation_checks import scores_and_answers, stock_scores
from distributed.reference import make_trainer, plain_model, whole_weights
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation.eval_jobs import LowBits, jobs_of
from speft_ds.evaluation.low_bits import low_bits_notes, round_weights
from speft_ds.model.codecs import CODECS


def check_low_bits(recipe: Recipe, weights: str | None, activations: str | None) -> list[dict] | None:
    """The same with the linears' weights and inputs in these formats."""
    trainer = make_trainer(recipe)
    trainer.evaluation.low_bits = LowBits(weights, activations)
    module = trainer.engine.module
    if weights:
        round_weights(module, weights)
    scored = list(trainer.evaluation.run(module, jobs_of(recipe.eval, "before"), {}))
    if collectives.rank() != 0:
        return None
    return [{**scores_and_answers(each.results), "document": each.file.model_dump()} for each in scored]


def check_rounded_weights(recipe: Recipe, name: str, transposed: bool | None) -> tuple[set[str], str]:
    """Weights that differ from those of the plain model, rounded one by one; and what is said of them.

    Args:
        transposed: whether experts are [experts, in, out]; None: they stay as they are.
    """
    module = make_trainer(recipe).engine.module
    notes = low_bits_notes(module, LowBits(weights=name))
    round_weights(module, name)
    plain = plain_model(recipe)
    got, wanted = whole_weights(module), plain.state_dict()
    modules = plain.named_modules()
    linears = {f"{place}.weight" for place, each in modules if type(each) is nn.Linear}
    for key, weight in wanted.items():
        if weight.dim() == 3 and transposed is not None:
            rounded = [one.t() if transposed else one for one in weight]
            rounded = [InFormats.through(one.contiguous(), name) for one in rounded]
            wanted[key] = torch.stack([one.t() if transposed else one for one in rounded])
        elif key in linears and "layers" in key:
            wanted[key] = InFormats.through(weight, name)
    return {key for key, weight in got.items() if not torch.equal(weight, wanted[key])}, " ".join(notes)


class InFormats(nn.Module):
    """A linear with its weight in a format, and its inputs: written out with what the codecs are."""

    def __init__(self, linear: nn.Module, weights: str | None, activations: str | None):
        super().__init__()
        is_conv1d = not isinstance(linear, nn.Linear)
        weight = linear.weight.detach().t() if is_conv1d else linear.weight.detach()
        self.weight = self.through(weight.contiguous(), weights)
        self.bias, self.activations = linear.bias, activations

    @staticmethod
    def through(matrix: Tensor, name: str | None) -> Tensor:
        if name is None:
            return matrix
        packed, scales = CODECS[name].encode(matrix)
        return CODECS[name].decode(packed, scales, matrix.shape, matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.nn.functional.linear(
            self.through(rows, self.activations).view(x.shape), self.weight, self.bias
        )


def put_in_formats(model: nn.Module, weights: str | None, activations: str | None) -> int:
    """Replace every linear below a list of layers; returns how many there are."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    ]
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, InFormats(model.get_submodule(name), weights, activations))
    return len(names)


def check_stock_low_bits(recipe: Recipe, weights: str | None, activations: str | None) -> dict | None:
    """The same tasks by lm-eval's own HFLM on the plain model with its linears replaced."""
    if collectives.rank() != 0:
        return None
    model = plain_model(recipe).to(collectives.device())
    put_in_formats(model, weights, activations)
    return stock_scores(model, recipe)
