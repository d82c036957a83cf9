"""Multiply-adds of a step, and the share that the weight gradient of the mask adds; by which kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from speft_ds.config.recipe import Recipe
from speft_ds.env import kernels_are_measured, threads_per_rank
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.kernels.measure import device_name, read_costs
from speft_ds.sparse.kernels.torch_backends import samples_columns
from speft_ds.tools.plan.setup import Setup


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-adds of a micro-batch on each rank, every row as long as data.max_length.

    Attributes:
        model: forward, recomputation and gradients of inputs, which the frozen model costs, too.
        dense: the weight gradient of all targeted weights.
        mask: that of the mask by `backend`, the one that most of the targeted elements should take.
        device: whose measured costs say so; None: the recipe or a rule of thumb does.
    """

    model: int
    dense: int
    mask: int
    backend: str
    device: str | None

    @property
    def share(self) -> float:
        """Of the step, what the mask's weight gradient is."""
        return self.mask / (self.model + self.mask)

    @property
    def dense_share(self) -> float:
        """Of a step with the dense weight gradient, what that would be."""
        return self.dense / (self.model + self.dense)


def count_arithmetic(setup: Setup) -> Arithmetic:
    """The multiply-adds of a training step's micro-batch."""
    recipe, geometry, backend = setup.recipe, setup.geometry, setup.backend
    run = setup.run_pass("entries", recipe.train.micro_batch, recipe.data.max_length)
    share, confined = geometry.density, recipe.mask.compute or 1.0
    num_inside = round(confined * geometry.num_target_elements)
    if backend == "dense":
        share = 1.0
    elif backend == "columns" and not samples_columns(geometry.num_entries, num_inside, setup.device):
        share = confined
    mask = round(share * run.of_dense_gradient)
    device = setup.costs.device if setup.costs and recipe.train.sparse_backend == "auto" else None
    return Arithmetic(run.multiply_adds, run.of_dense_gradient, mask, backend, device)


def known_costs(recipe: Recipe, device: str, world_size: int) -> KernelCosts | None:
    """What was measured on this machine and a run here would choose kernels by; None: nothing.

    Args:
        recipe: with its dtype resolved.
        device: `cuda`, which this machine may lack, or `cpu`, whose cores the ranks share.
    """
    if not kernels_are_measured() or (device == "cuda" and not torch.cuda.is_available()):
        return None
    name = device_name(torch.device(device), threads_per_rank(os.environ, world_size))
    return read_costs(name, recipe.model.dtype)
