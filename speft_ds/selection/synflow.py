"""A network made linear and non-negative for a moment: what SynFlow scores flow through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.zero.shards import changing_shards, shard_of

ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


@contextmanager
@torch.no_grad()
def absolute_weights(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Every ZeRO-3 shard holds absolute values inside the block, and its own bits again after it."""
    signs = [np.packbits(torch.signbit(shard_of(parameter)).cpu().numpy()) for parameter in parameters]
    with changing_shards(parameters):
        for parameter in parameters:
            shard_of(parameter).abs_()
    try:
        with torch.enable_grad():
            yield
    finally:
        with changing_shards(parameters):
            for parameter, packed in zip(parameters, signs, strict=True):
                shard = shard_of(parameter)
                is_negative = torch.from_numpy(np.unpackbits(packed, count=shard.numel())).to(shard.device)
                shard.copy_(torch.where(is_negative.bool(), -shard, shard))


@contextmanager
def linear_network(model: nn.Module) -> Iterator[Tensor]:
    """Activations pass their input on and norms only scale, inside the block.

    Attention is computed step by step: the softmax over one token is exactly 1 and its gradient exactly 0,
    so none flows to queries and keys. A fused kernel recomputes it in its backward, and rounds.

    Yields:
        [1, 1, hidden] ones in the model's dtype, which need a gradient: the input.
    Raises:
        UserError: no activation module is found, so the network would not be linear.
    """
    activations = [m for m in model.modules() if type(m).__module__ in ACTIVATION_MODULES]
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    if not activations:
        raise UserError(
            "this model computes its activations outside of modules, so they cannot be made linear",
            where="mask.salience=synflow",
            fix="choose another metric",
        )
    config = model.config
    capping = getattr(config, "final_logit_softcapping", None)  # a tanh, which would stop the flow
    for module in activations:
        module.forward = nn.Identity.forward.__get__(module)
    for module in norms:
        module.forward = partial(only_scale, module)
    if capping is not None:
        config.final_logit_softcapping = None
    width = model.get_input_embeddings().embedding_dim
    dtype = next(model.parameters()).dtype
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield torch.ones(1, 1, width, dtype=dtype, device=collectives.device(), requires_grad=True)
    finally:
        for module in [*activations, *norms]:
            del module.forward  # the class's own shows again
        if capping is not None:
            config.final_logit_softcapping = capping


def only_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """x times the factor that the norm has at x, held constant; a LayerNorm is taken without its mean."""
    with torch.no_grad():
        values = x.float()
        if isinstance(norm, nn.LayerNorm):
            factor = norm.weight.float() / values.square().mean(-1, keepdim=True).sqrt()
        else:
            factor = type(norm).forward(norm, x).float() / values
        factor = torch.nan_to_num(factor.abs(), nan=0.0, posinf=0.0)  # 0 / 0
    return (x.float() * factor).to(x.dtype)
