"""Objectives: the next token, or the class of a row. Forward and loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from speft_ds.errors import UserError
from speft_ds.model.attention import FlashInputs, reads_packing
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
        self.flash = FlashInputs.of(model)
        arguments = inspect.signature(model.forward).parameters
        self.can_keep_logits = "logits_to_keep" in arguments
        takes_positions = "position_ids" in arguments
        if packing and not (takes_positions and tells_rows_apart(model, after_backward, self.flash)):
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
        inputs = _inputs(batch, self.switch, self.flash)
        is_packed = reads_packing("position_ids" in inputs)
        if self.head_loss is not None and not self.head_loss.has_hook:
            where = (batch["predicting"], batch["targets"])
            with is_packed, self.head_loss.compute(*where, temperature) as losses:
                module(**inputs, use_cache=False)
            return losses[0], None
        # Logits over the prompts would be thrown away, and cost a fifth of a small model's step.
        length, options = batch["input_ids"].shape[1], {}
        predicting = batch["predicting"]
        if self.can_keep_logits and inputs["input_ids"].shape == batch["input_ids"].shape:
            keep = options["logits_to_keep"] = batch["num_logits"]
            predicting = predicting // length * keep + predicting % length - (length - keep)
        with is_packed:
            logits = module(**inputs, use_cache=False, **options).logits
        return summed_loss(logits.flatten(0, 1)[predicting], batch["targets"], temperature), None


def _inputs(batch: dict[str, Tensor], switch: int | None, flash: FlashInputs | None) -> dict:
    """What a model is given of a batch.

    Args:
        switch: of LongRoPE. A batch with rows on both sides has positions, which end a row at its padding.
        flash: None: attention tells packed rows apart by their positions.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if flash is not None and "cu_seq_lens" in batch:
        return flash(inputs, batch["cu_seq_lens"], batch["max_length"])
    if switch is None or "position_ids" in batch:
        return inputs
    lengths = batch["lengths"]
    if lengths.min() <= switch < lengths.max():
        places, lengths = torch.arange(batch["input_ids"].shape[1]), lengths[:, None]
        positions = torch.where(places < lengths, places, places - lengths)
        inputs["position_ids"] = positions.to(batch["input_ids"].device)
    return inputs


def tells_rows_apart(
    model: nn.Module, after_backward: Callable[[], None], flash: FlashInputs | None = None
) -> bool:
    """Whether a row's logits do not depend on the row that is packed before it. Asks the model itself.

    Some models take position_ids and make no attention mask of them.
    """
    device = next(model.parameters()).device
    ids, positions = torch.tensor([[[0, 1, 1, 1]], [[0, 1, 0, 1]]], device=device)
    inputs = {"input_ids": ids, "position_ids": positions}
    if flash is not None:
        inputs = flash(inputs, torch.tensor([0, 2, 4], dtype=torch.int32, device=device), 2)
    asked = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    gradient = embedding_gradient(model, nullcontext(), asked, **inputs)
    after_backward()
    return not gradient[:, :2].any()


class RowClass:
    """Predict the class of a row: from the hidden state of its last token, which is an EOS.

    Args:
        switch: see `longrope.rotate_by_row`.
        flash: see `attention.FlashInputs`.
    """

    def __init__(self, switch: int | None = None, flash: FlashInputs | None = None):
        self.switch, self.flash = switch, flash

    def __call__(
        self, module: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch (fp32 scalar), and the number of rows whose class was the most likely."""
        inputs = _inputs(batch, self.switch, self.flash)
        with reads_packing("position_ids" in inputs):
            logits = module(**inputs, use_cache=False).logits
        num_correct = (logits.argmax(-1) == batch["labels"]).sum()
        return summed_loss(logits, batch["labels"], temperature), num_correct


def summed_loss(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum of the cross-entropies (fp32) of [n, classes or vocabulary] logits at the [n] targets.

    Args:
        temperature: the logits are divided by it.
    """
    return torch.nn.functional.cross_entropy(logits.float() / temperature, targets, reduction="sum")
