"""What a model's outputs depend on, asked of the model itself."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn


def embedding_gradient(
    model: nn.Module, forward_context: AbstractContextManager, asked: Tensor, **inputs: Tensor
) -> Tensor:
    """How the summed logits of some tokens change with each embedded token: exactly 0 where it is not seen.

    In evaluation mode, so without a random number. Sharded, the model is in its engine, whose
    `after_plain_backward` has to follow.

    Args:
        forward_context: entered around the forward.
        asked: [rows, tokens] 1.0 where a token's logits are summed, else 0.0; a classifier's, which are of a
            row, are summed whatever is asked.
        inputs: `input_ids` [rows, tokens], and what else the model takes.
    Returns:
        [rows, tokens, width] the gradient.
    """
    embedded, was_training = [], model.training

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1].clone()  # which the model may scale in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    model.eval()
    try:
        with forward_context:
            logits = model(**inputs, use_cache=False).logits.float().sum(-1)
        (logits * asked if logits.dim() == asked.dim() else logits).sum().backward()
    finally:
        handle.remove()
        model.train(was_training)
    return embedded[0].grad
