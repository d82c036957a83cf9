"""References of the methods: plain autograd and torch's AdamW in one process."""

from __future__ import annotations

import torch

from distributed.reference import DenseRun


class DenseMethod(DenseRun):
    """A run whose whole weights are trained by autograd and the optimizer as they are, beside the mask."""

    def __init__(self, trainer, model=None, **how):
        whole = {name: torch.arange(target.numel) for name, target in trainer.context.whole.items()}
        super().__init__(trainer, model, picked=trainer.mask.index | whole, whole=set(whole), **how)
