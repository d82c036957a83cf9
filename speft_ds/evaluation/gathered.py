"""A plain copy of the sharded model on every rank, where it fits: scoring without communication."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from speft_ds.comm import collectives
from speft_ds.comm.collectives import log_rank0
from speft_ds.zero.shards import full_shape

MAX_SHARE = 0.5  # of the free memory, for the copy: activations, logits and the KV cache need the rest


@contextmanager
def model_to_score(module: nn.Module, mode: str) -> Iterator[tuple[nn.Module, bool]]:
    """The model to run, and whether it is sharded; every rank enters this together.

    Args:
        module: the engine's.
        mode: `sharded`: the engine's module; `gathered`: a plain copy on every rank; `auto`: the copy where
            it takes at most half of every rank's free memory.
    """
    if mode == "sharded" or (mode == "auto" and not copy_fits(module)):
        was_training = module.training
        module.eval()
        yield module, True
        module.train(was_training)
    else:
        yield plain_copy(module).eval(), False


def copy_fits(module: nn.Module) -> bool:
    """Whether a copy fits on every rank; the same answer on all ranks."""
    needed = sum(full_shape(weight).numel() * weight.element_size() for weight in module.parameters())
    device = collectives.device()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ["LOCAL_SIZE"])
    is_short = torch.tensor([float(needed > MAX_SHARE * free)], device=device)
    fits = collectives.all_reduce_max(is_short).item() == 0
    if not fits:
        gib = needed / 2**30
        log_rank0(f"note: no room for a copy of the model ({gib:.1f} GiB) on every rank: scored sharded")
    return fits


@torch.no_grad()
def plain_copy(module: nn.Module) -> nn.Module:
    """An unsharded copy of the same bits on this rank's device; every rank makes one together."""
    import deepspeed

    with torch.device("meta"):
        plain = type(module)(copy.deepcopy(module.config))
    plain.generation_config = copy.deepcopy(module.generation_config)
    device = collectives.device()
    weights, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, empty in plain.named_parameters():
        with deepspeed.zero.GatheredParameters([weights[name]]):
            values = weights[name].detach().to(device, copy=True)
        assert values.shape == empty.shape, name
        _replace(plain, name, nn.Parameter(values, requires_grad=False))
    for name, _ in plain.named_buffers():
        _replace(plain, name, buffers[name].detach().to(device, copy=True))
    plain.tie_weights()
    return plain


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or a buffer by its full name."""
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, value)
