"""Objectives: the next token, or the class of a row. Forward and loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from speft_ds.data.collate import IGNORED, num_logits
from speft_ds.errors import UserError
from speft_ds.model.linear_cross_entropy import HeadLoss
from speft_ds.model.probe import embedding_gradient


class NextToken:
    """Predict the label tokens of a row.

    Args:
        model: the causal language model; sharded, it is in its engine.
        packing: whether rows may be packed.
        switch: see `longrope.rotate_by_row`.
        head_loss: how the loss is computed without logits; None: from the model's own.
        after_backward: called after a backward that asks the model about packed rows.
    Raises:
        UserError: rows are packed and the model takes no positions, from which it could tell them apart.
    """

    def __init__(
        self,
        model: nn.Module,
        packing: bool,
        after_backward: Callable[[], None] = lambda: None,
        switch: int | None = None,
        head_loss: HeadLoss | None = None,
    ):
        self.switch, self.head_loss = switch, head_loss
        # Flash attention tells packed rows apart in a batch of one alone.
        self.is_flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
        arguments = inspect.signature(model.forward).parameters
        self.can_keep_logits = "logits_to_keep" in arguments
        if packing and not ("position_ids" in arguments and tells_rows_apart(model, after_backward)):
            what = f"{type(model).__name__} does not tell packed rows apart: they would see each other"
            raise UserError(what, "data.packing", "data.packing=false")

    def __call__(
        self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Summed loss of a batch (fp32 scalar); and None, since nobody counts correct tokens.

        Args:
            module: the engine, or its module.
            batch: as `collate` makes it.
            temperature: the logits are divided by it.
        """
        inputs = _inputs(batch, self.switch)
        if self.is_flash and "position_ids" in inputs:
            inputs = {name: tensor.view(1, -1) for name, tensor in inputs.items()}
        if self.head_loss is not None and not self.head_loss.is_trained:
            with self.head_loss.compute(batch["predicting"], batch["targets"], temperature) as losses:
                module(**inputs, use_cache=False)
            return losses[0], None
        # Logits over the prompts would be thrown away, and cost a fifth of a small model's step.
        labels = batch["labels"].view(len(inputs["input_ids"]), -1)
        keep = num_logits(labels) if self.can_keep_logits else 0
        options = {"logits_to_keep": keep} if keep else {}
        logits = module(**inputs, use_cache=False, **options).logits
        return summed_loss(logits, labels[:, -keep:], temperature), None


def _inputs(batch: dict[str, Tensor], switch: int | None) -> dict[str, Tensor]:
    """What a model is given of a batch.

    Args:
        switch: of LongRoPE. A batch with rows on both sides has positions, which end a row at its padding.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if switch is None or "position_ids" in batch:
        return inputs
    lengths = batch["lengths"]
    if lengths.min() <= switch < lengths.max():
        places, lengths = torch.arange(batch["input_ids"].shape[1]), lengths[:, None]
        positions = torch.where(places < lengths, places, places - lengths)
        inputs["position_ids"] = positions.to(batch["input_ids"].device)
    return inputs


def tells_rows_apart(model: nn.Module, after_backward: Callable[[], None]) -> bool:
    """Whether a row's logits do not depend on the row that is packed before it. Asks the model itself.

    Some models take position_ids and make no attention mask of them.
    """
    device = next(model.parameters()).device
    ids, positions = torch.tensor([[[0, 1, 1, 1]], [[0, 1, 0, 1]]], device=device)
    asked = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    gradient = embedding_gradient(model, nullcontext(), asked, input_ids=ids, position_ids=positions)
    after_backward()
    return not gradient[:, :2].any()


class RowClass:
    """Predict the class of a row: from the hidden state of its last token, which is an EOS.

    Args:
        switch: see `longrope.rotate_by_row`.
    """

    def __init__(self, switch: int | None = None):
        self.switch = switch

    def __call__(
        self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch (fp32 scalar), and the number of rows whose class was the most likely."""
        logits = module(**_inputs(batch, self.switch), use_cache=False).logits
        num_correct = (logits.argmax(-1) == batch["labels"]).sum()
        return summed_class_loss(logits, batch["labels"], temperature), num_correct


def summed_loss(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of the token cross-entropies (fp32) of [rows, tokens, vocabulary] logits at the label tokens.

    Args:
        temperature: the logits are divided by it.
    """
    predicted = labels[:, 1:] != IGNORED
    scaled = logits[:, :-1][predicted].float() / temperature
    return torch.nn.functional.cross_entropy(scaled, labels[:, 1:][predicted], reduction="sum")


def summed_class_loss(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of the cross-entropies (fp32) of [rows, classes] logits at the [rows] classes."""
    return torch.nn.functional.cross_entropy(logits.float() / temperature, labels, reduction="sum")
