"""The loss of label tokens from a head's inputs, with the logits of a chunk of them alive at a time.

A chunk's loss and its gradients, of the hidden states and of a head that is trained, whole or in some rows,
are made together in the forward. It all happens where the head is called: ZeRO-3 gathers its weight as ever,
and not again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speft_ds.model.kinds import linear

# fp32 logits alive at once. The first still fit into a CPU's cache with room for products of a good size.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
SMALL, LARGE = 2.0**-10, 2.0**20  # logits that no cap changes, and that every cap does


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its head: `cap * tanh(scale * logits / cap)`.

    Granite and Cohere scale them, Gemma 2 caps them.

    Attributes:
        cap: None: there is none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """The derivative, by the logits that the head made, where they were transformed to these."""
        return self.scale if self.cap is None else (1 - (transformed / self.cap).square()) * self.scale


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of chosen tokens: see `HeadLoss`. The head's bias has no gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, positions, targets, transform, temperature, chunk_bytes):
        flat = hidden.reshape(-1, hidden.shape[-1])
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        of_weight, hook = None, getattr(weight, "grad_hook", None)
        rows = getattr(hook, "rows", slice(None))  # that the hook asks for
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight[rows], dtype=torch.float32)
        needs_slope = gradient is not None or of_weight is not None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, chunk_bytes // (4 * weight.shape[0]))
        for where, target in zip(positions.split(size), targets.split(size), strict=True):
            logits = transform(F.linear(flat[where], weight, bias)).float()
            slope = transform.slope(logits) if needs_slope else 1.0
            logits = logits / temperature if temperature != 1.0 else logits
            # In place from here on: the softmax, and the loss on the way.
            logits -= logits.amax(-1, keepdim=True)
            of_target = logits.gather(-1, target[:, None])
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - of_target).sum()
            if needs_slope:
                logits /= total
                logits.scatter_add_(-1, target[:, None], torch.full_like(of_target, -1.0))
                logits *= slope / temperature
            if gradient is not None:
                gradient[where] = logits.to(weight.dtype) @ weight
            if of_weight is not None:
                of_weight.addmm_(logits[:, rows].t(), flat[where].float())
        ctx.save_for_backward(None if gradient is None else gradient.view_as(hidden), of_weight)
        ctx.dtype, ctx.hook = weight.dtype, hook
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        gradient, of_weight = ctx.saved_tensors
        of_hidden = None if gradient is None else gradient * grad_loss
        if of_weight is None:
            return of_hidden, *[None] * 7
        of_weight *= grad_loss
        if ctx.hook is None:
            return of_hidden, of_weight.to(ctx.dtype), *[None] * 6
        # Not by way of autograd: ZeRO-3 does not gather a head that has no backward of its own, and autograd
        # compares what it adds with the weight.
        ctx.hook(of_weight)
        return of_hidden, *[None] * 7


class HeadLoss:
    """The loss of a causal model where its head is called, in place of logits.

    Args:
        head: a linear that is frozen, or trained whole, or of which rows are.
        transform: what the model does to the head's logits.
        device: `cpu` or `cuda`, where it is going to run.
    """

    def __init__(self, head: nn.Linear, transform: LogitTransform, device: str):
        self.head, self.transform, self.chunk_bytes = head, transform, CHUNK_BYTES[device]

    @property
    def has_hook(self) -> bool:
        """Whether the head wants factors of its gradient, or a bias is trained: its own product is needed."""
        bias = self.head.bias
        is_bias_trained = bias is not None and bias.requires_grad
        return is_bias_trained or getattr(self.head, "weight_grad_hook", None) is not None

    @contextmanager
    def compute(self, positions: Tensor, targets: Tensor, temperature: float) -> Iterator[list[Tensor]]:
        """While it is entered, one forward of the model leaves its loss in the list, and has no logits.

        Args:
            positions: [n] of the tokens that predict, among all tokens of the batch laid end to end.
            targets: [n] what they should predict.
            temperature: the logits are divided by it.
        """
        hidden: list[Tensor] = []
        losses: list[Tensor] = []

        def before_zero(head: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # ZeRO-3 would wait for a backward of the head, which there is none of.
            hidden.extend(inputs)
            return (inputs[0].detach(),)

        def with_weight(head: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            arguments = (positions, targets, self.transform, temperature, self.chunk_bytes)
            losses.append(_LinearCrossEntropy.apply(hidden.pop(), head.weight, head.bias, *arguments))
            return (inputs[0][:, :0],)  # logits of no token

        first = self.head.register_forward_pre_hook(before_zero, prepend=True)
        last = self.head.register_forward_pre_hook(with_weight)
        try:
            yield losses
        finally:
            first.remove()
            last.remove()


@torch.no_grad()
def find_head_loss(model: nn.Module, forward: Callable | None = None) -> HeadLoss | None:
    """How to compute the model's loss at its head; None where it does something else with the head's logits.

    Asks the model itself: known numbers in place of the head's logits show what it makes of them. Sharded,
    the model is in its engine, and all ranks call this.

    Args:
        forward: what runs the model's forward; None: the model itself.
    """
    head = model.get_output_embeddings()
    if head is None or not linear.find(head):
        return None
    known: list[Tensor] = []

    def replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        values = torch.linspace(-64, 64, output.numel(), device=output.device)
        values[:2] = torch.tensor([SMALL, LARGE])
        known.append(values.view(output.shape))
        return known[-1].clone()

    handle, was_training = head.register_forward_hook(replace), model.training
    model.eval()
    try:
        ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        logits = (forward or model)(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(known) != 1 or logits.shape != known[0].shape:
        return None
    small, large = logits.flatten()[:2].tolist()
    scale = small / SMALL
    transform = LogitTransform(scale, large if large < 0.5 * scale * LARGE else None)
    tolerance = 8 * torch.finfo(logits.dtype).eps
    is_right = torch.allclose(transform(known[0]), logits.float(), rtol=tolerance, atol=tolerance)
    return HeadLoss(head, transform, logits.device.type) if scale > 0 and is_right else None
