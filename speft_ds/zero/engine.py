"""The DeepSpeed seam: all that touches DeepSpeed's less public names.

With no trainable parameter, a ZeRO-3 engine builds `DeepSpeedZeRoOffload`, which gathers and releases
weights but trains nothing. `SparseEngine` puts a `SparseZeroOptimizer` around it, so that the standard
calls `engine(...)`, `engine.backward(loss)`, `engine.step()` train the sparse state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import getclosurevars
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.zero import shards
from speft_ds.zero.shards import changing_shards, global_norm, repartition, shard_of, squared_norm

if TYPE_CHECKING:  # what is trained lies above the engine
    from speft_ds.sparse.gradient import SparseGradient
    from speft_ds.sparse.optim.optimizers import FlatOptimizer
    from speft_ds.sparse.state import SparseState


@dataclass
class Trainable:
    """What an engine trains: this rank's flat `state.delta`."""

    state: SparseState
    gradient: SparseGradient
    optimizer: FlatOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    clip: Callable[[Tensor, float, dict[str, slice]], None]  # (gradient, its global norm, slices), in place
    # Sees the summed gradient [num_local] before each step; which entries step ([num_local] bool; None: all).
    on_gradient: Callable[[Tensor], Tensor | None]


class SparseZeroOptimizer(ZeROOptimizer):
    """Stands where ZeRO-3's optimizer stands; everything it does not know goes to the wrapped offload.

    Before `SparseEngine.attach` it can only run forwards (evaluation) and plain backwards (calibration).
    """

    custom_loss_scaler = False
    torch_autocast_gradscaler = None
    dynamic_loss_scale = False
    loss_scaler = None

    def __init__(self, offload):
        super().__init__()
        self.offload = offload
        self.trained: Trainable | None = None
        self.overflow = False  # whether the last step was skipped, which DeepSpeed looks for
        # Of the next step, where the caller has reduced it with other values: whether to skip it, and the
        # squared norm of its gradient over all ranks.
        self.skip_step, self.squared_norm = False, None
        self.is_unpartitioned = False  # whether no weight is ever gathered or released
        self._global_grad_norm = 0.0

    def __getattr__(self, name):
        return getattr(self.__dict__["offload"], name)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those whose shards `trained` writes to, as they are now: a base in few bits gets other ones."""
        storages = self.trained.state.storages.values() if self.trained else ()
        return [weight for storage in storages for weight in storage.written]

    @property
    def param_groups(self) -> list:
        return self.trained.optimizer.param_groups if self.trained else []

    def keep_unpartitioned(self) -> None:
        """Keep the weights of a single rank, which are complete, and take ZeRO-3's hooks off all modules.

        The weights are views of the shards, in which they are trained. A hook on the model makes views again
        of those that were released since its last forward.
        """
        self.is_unpartitioned = True
        self.offload._remove_module_hooks()

        def before_forward(module: nn.Module, inputs) -> None:
            released = [p for p in module.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            if released:
                released[0].all_gather_coalesced(released).wait()

        self.offload.module.register_forward_pre_hook(before_forward, prepend=True)
        for module in self.offload.module.modules():
            module.register_forward_pre_hook(alias_inputs)

    def backward_epilogue(self, **kwargs) -> None:
        if self.is_unpartitioned:
            return
        # A backward ends at the lowest layer that is trained, and the hooks of what takes no gradient never
        # fire. What was gathered for them, or is on its way, would otherwise stay.
        self.offload.release_backward_leftovers()
        self.offload.get_param_coordinator()._clean_inflight_param_registry()
        repartition([p for p in self.offload.module.parameters() if not p.ds_persist])

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Called by the engine after every micro-batch's backward: what was not reduced during it, is now."""
        if self.trained is None:
            return
        self.trained.gradient.finish()
        if self.is_gradient_accumulation_boundary():
            self.trained.state.delta.grad = self.trained.gradient.own

    def own_squared_norm(self) -> Tensor:
        """Of this rank's part of the gradient of the next step: an fp64 scalar on the device."""
        return squared_norm(self.trained.state.delta.grad)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Clip what steps by its norms over all ranks, step the optimizer, write the deltas into the shards.

        A gradient that is not finite, or one whose loss was not (`skip_step`), changes nothing: `overflow` is
        set then, by which the engine counts the step as skipped and leaves the learning rate where it is.
        """
        trained, state = self.trained, self.trained.state
        gradient = state.delta.grad
        squared, self.squared_norm = self.squared_norm, None
        self._global_grad_norm = global_norm(gradient) if squared is None else math.sqrt(squared)
        self.overflow = self.skip_step or not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        active = trained.on_gradient(gradient)
        if active is not None:
            gradient.masked_fill_(~active, 0.0)
            self._global_grad_norm = global_norm(gradient)
        trained.clip(gradient, self._global_grad_norm, state.slices)
        trained.optimizer.step(active=active)
        with changing_shards([] if self.is_unpartitioned else self.weights):
            state.write_through()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.trained is not None:
            self.trained.state.delta.grad = None
            self.trained.gradient.clear()


class SparseEngine(DeepSpeedEngine):
    """A `DeepSpeedEngine` over a frozen ZeRO-3 model that trains what is attached to it."""

    def _configure_zero_optimizer(self, optimizer):
        return SparseZeroOptimizer(super()._configure_zero_optimizer(None))

    def attach(self, trained: Trainable) -> None:
        """Train this from here on: at the start, and after every change of the mask."""
        self.optimizer.trained = trained
        self.lr_scheduler = trained.lr_scheduler
        self.forget_trace()  # backwards may end elsewhere from here on

    def forget_trace(self) -> None:
        """Have ZeRO-3 learn anew in which order modules are used, and prefetch and release by that."""
        coordinator = self.optimizer.offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        # What a module releases is kept by its place in the order, for good: a weight that the module got
        # since then would stay gathered.
        releases = coordinator._PartitionedParameterCoordinator__params_to_release
        getclosurevars(releases).nonlocals["func"].cache_clear()

    def after_plain_backward(self) -> None:
        """What the engine does after its own backward, for a `loss.backward()` that it did not run."""
        self.optimizer.backward_epilogue()


def build_engine(
    model: nn.Module,
    ds_config: dict,
    trained: Iterable[nn.Parameter],
    walks_all_layers: bool = False,
    keep_unpartitioned: bool = True,
) -> SparseEngine:
    """A `SparseEngine` over a frozen model; trained weights are never persistent.

    Args:
        model: frozen, loaded under `zero.Init`.
        ds_config: as `deepspeed_config.load_ds_config` returns it.
        trained: the weights of which something may be trained.
        walks_all_layers: have a backward go down to the embedding, not just to the lowest layer that is
            trained: where that is another one every step, or inputs must need a gradient (re-entrant
            activation checkpointing).
        keep_unpartitioned: on a single rank, never gather or free a weight.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the base must be frozen: call requires_grad_(False) on the model")
    config = DeepSpeedConfig(ds_config)
    engine = SparseEngine(args=None, model=model, config=ds_config, config_class=config)
    # Small weights stay gathered ("persistent") and would go stale when their shard changes.
    for weight in trained:
        weight.ds_persist = False
    offload = engine.optimizer.offload
    offload.persistent_parameters = [p for p in offload.persistent_parameters if p.ds_persist]
    if engine.device.type != "cpu":
        coordinator = offload.get_param_coordinator()
        shards.gather_stream = coordinator._PartitionedParameterCoordinator__allgather_stream
        shards.gathers_wait()  # for what loading wrote
    on_device = all(shard_of(p).device.type == engine.device.type for p in model.parameters())
    if keep_unpartitioned and collectives.world_size() == 1 and on_device:
        engine.optimizer.keep_unpartitioned()
    if walks_all_layers:
        # After DeepSpeed's hooks, so that they see an output without gradient and do not gather the
        # embedding again in the backward.
        model.get_input_embeddings().register_forward_hook(require_grad)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    return engine


def require_grad(module: nn.Module, inputs, output: Tensor) -> Tensor:
    """Forward hook of the embedding: its output needs a gradient, so that autograd walks the layers."""
    return output.requires_grad_(True) if torch.is_grad_enabled() else output


def alias_inputs(module: nn.Module, inputs: tuple) -> tuple:
    """Forward pre-hook: each module gets an alias of its inputs, as ZeRO-3's hooks give it on several ranks.

    The gradients of a module's own uses of an input are then summed before those of other modules are added:
    scores have the same bits on one rank as on several.
    """
    return tuple(torch.ops.aten.alias(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Of a slice of the positions, torch multiplies a copy of the vocabulary's weight for every row.
    return tuple(x.contiguous() for x in inputs)
