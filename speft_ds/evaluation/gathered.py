"""A plain copy of the sharded model on every rank: scoring without communication, where it fits."""

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

SHARE = 0.5  # of the free memory that the copy may take: activations, logits and the KV cache need the rest


@contextmanager
def model_to_score(module: nn.Module, mode: str) -> Iterator[tuple[nn.Module, bool]]:
    """The model to run, and whether it is sharded; every rank enters this together.

    Args:
        module: the engine's.
        mode: `sharded`: as it is; `gathered`: a plain copy on every rank; `auto`: the copy where it takes
            less than half of the free memory of every rank.
    """
    was_training = module.training
    if mode == "sharded" or (mode == "auto" and not copy_fits(module)):
        module.eval()
        yield module, True
        module.train(was_training)
        return
    yield plain_copy(module).eval(), False


def copy_fits(module: nn.Module) -> bool:
    """Whether a copy on every rank fits; the same on every rank."""
    needed = sum(full_shape(p).numel() * p.element_size() for p in module.parameters())
    device = collectives.device()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ["LOCAL_SIZE"])
    is_short = torch.tensor([float(needed > SHARE * free)], device=device)
    fits = collectives.all_reduce_max(is_short).item() == 0
    if not fits:
        log_rank0(
            f"note: a copy of the model ({needed / 2**30:.1f} GiB) has no room on every rank: scored sharded"
        )
    return fits


@torch.no_grad()
def plain_copy(module: nn.Module) -> nn.Module:
    """An unsharded copy, of the same bits, on this rank's device; every rank makes one together."""
    import deepspeed

    with torch.device("meta"):
        plain = type(module)(copy.deepcopy(module.config))
    plain.generation_config = copy.deepcopy(module.generation_config)
    device, buffers = collectives.device(), dict(module.named_buffers())
    sharded = dict(module.named_parameters())
    for name, empty in plain.named_parameters():
        with deepspeed.zero.GatheredParameters([sharded[name]]):
            values = sharded[name].detach().to(device, copy=True)
        _put(plain, name, nn.Parameter(values, requires_grad=False))
        assert values.shape == empty.shape, name
    for name, _ in plain.named_buffers():
        _put(plain, name, buffers[name].detach().to(device, copy=True))
    plain.tie_weights()
    return plain


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or a buffer that is still on the meta device."""
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        owner._parameters[own] = value
    else:
        owner._buffers[own] = value
