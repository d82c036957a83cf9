"""8-bit AdamW on a GPU: as on a CPU, and close to bitsandbytes' kernel."""

import logging

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTH, STEPS = 100_000, 100
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def gradients():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(LENGTH, generator=generator) * 0.5
    for _ in range(STEPS):
        yield torch.randn(LENGTH, generator=generator) + mean


def run(make, device="cuda"):
    """Where an optimizer takes zeros."""
    delta = nn.Parameter(torch.zeros(LENGTH, device=device))
    optimizer = make(delta)
    for gradient in gradients():
        delta.grad = gradient.to(device)
        optimizer.step()
    return delta.detach().cpu(), optimizer


def ours(delta):
    from speft_ds.sparse.optim.optimizers import AdamW8bit

    return AdamW8bit(delta, **SETTINGS, entry_steps=False)


def test_it_is_close_to_the_cpu_and_to_bitsandbytes_own():
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    on_gpu = run(ours)[0]
    on_cpu = run(ours, "cpu")[0]
    theirs = run(lambda delta: bitsandbytes.optim.AdamW8bit([delta], **SETTINGS))[0]
    moved = theirs.abs().mean()
    assert (on_gpu - on_cpu).abs().mean() < 1e-3 * moved
    assert (on_gpu - theirs).abs().mean() < 1e-2 * moved
