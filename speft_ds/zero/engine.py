"""The DeepSpeed seam: all that touches DeepSpeed's less public names.

With no trainable parameter, a ZeRO-3 engine builds `DeepSpeedZeRoOffload`, which gathers and releases
weights but trains nothing. `SparseEngine` puts a `SparseZeroOptimizer` around it, so that the standard
calls `engine(...)`, `engine.backward(loss)`, `engine.step()` train the sparse state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.model.input_recompute import PASSTHROUGH_GRAD_FNS
from speft_ds.sparse.optim.clipping import Clip
from speft_ds.sparse.optim.flat import FlatOptimizer
from speft_ds.sparse.state import SparseState
from speft_ds.zero.gather_counter import GatherCounter
from speft_ds.zero.shards import global_norm, shard_range

OnGradient = Callable[[Tensor], Tensor | None]

# The autograd functions by which ZeRO-3 hooks into the backward of every module, and what stands for them on
# a lone rank.
PASSTHROUGH_GRAD_FNS.update(
    {"PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward", "AliasBackward0"}
)


def shard_of(parameter: nn.Parameter) -> Tensor:
    """This rank's flat shard of a ZeRO-3 parameter, padding included: a live view, written in place."""
    return parameter.ds_tensor


def own_elements(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This rank's shard without padding, and the global flat index at which it starts."""
    start, stop = own_range(parameter)
    return shard_of(parameter)[: stop - start], start


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """[start, stop) of the global flat indices in this rank's shard, padding left out."""
    rank, world_size = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
    return shard_range(parameter.ds_numel, rank, world_size)


def is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole weight, whether or not it is gathered right now."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape


class SparseZeroOptimizer(ZeROOptimizer):
    """Stands where ZeRO-3's optimizer stands; everything it does not know goes to the wrapped offload.

    Before `attach` it can only run forwards (evaluation) and plain backwards (calibration).
    """

    custom_loss_scaler = False
    torch_autocast_gradscaler = None
    dynamic_loss_scale = False
    loss_scaler = None

    def __init__(self, offload):
        super().__init__()
        self.offload = offload
        self.state: SparseState | None = None
        self.optimizer: FlatOptimizer | None = None
        self.weights: list[nn.Parameter] = []
        self.on_gradient: OnGradient | None = None
        self.clip: Clip | None = None
        self.overflow = False  # whether the last step was skipped, which DeepSpeed looks for
        self.discard = False  # whether to skip the next one
        self.is_whole = False  # whether no weight is ever gathered or released
        self._global_grad_norm = 0.0

    def __getattr__(self, name):
        return getattr(self.__dict__["offload"], name)

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups if self.optimizer else []

    def attach(self, state: SparseState, optimizer, clip: Clip, on_gradient, weights: list) -> None:
        """Train `state` with `optimizer`, whose one parameter is the state's delta; see SparseEngine."""
        self.state, self.optimizer, self.clip, self.weights = state, optimizer, clip, weights
        self.on_gradient = on_gradient

    def keep_whole(self) -> None:
        """Have weights that are whole on this rank stay so, and ZeRO-3 not look for them at every module.

        They are views of the shards, in which they are trained. A hook on the whole model makes views again
        of those that were released since its last forward.
        """
        self.is_whole = True
        self.offload._remove_module_hooks()

        def before_forward(module: nn.Module, inputs) -> None:
            released = [p for p in module.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            if released:
                released[0].all_gather_coalesced(released).wait()

        self.offload.module.register_forward_pre_hook(before_forward, prepend=True)
        for module in self.offload.module.modules():
            module.register_forward_pre_hook(_sum_apart)

    def backward_epilogue(self, **kwargs) -> None:
        if self.is_whole:
            return
        # A backward ends at the lowest layer that is trained, and the hooks of what takes no gradient never
        # fire. What was gathered for them, or is on its way, would otherwise stay.
        self.offload.release_backward_leftovers()
        self.offload.get_param_coordinator()._clean_inflight_param_registry()
        release([p for p in self.offload.module.parameters() if not p.ds_persist])

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Called by the engine after every micro-batch's backward: what was not reduced during it, is now."""
        if self.state is None:
            return
        self.state.gradient.finish()
        if self.is_gradient_accumulation_boundary():
            self.state.delta.grad = self.state.gradient.pop()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Clip what steps by its norms over all ranks, step the optimizer, write the deltas into the shards.

        A gradient that is not finite, or one whose loss was not (`discard`), changes nothing: `overflow` is
        set then, by which the engine counts the step as skipped and leaves the learning rate where it is.
        """
        gradient = self.state.delta.grad
        self._global_grad_norm = global_norm(gradient)
        self.overflow = self.discard or not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        active = self.on_gradient(gradient) if self.on_gradient else None
        if active is not None:
            gradient.masked_fill_(~active, 0.0)
            self._global_grad_norm = global_norm(gradient)
        self.clip(gradient, self._global_grad_norm, self.state.slices)
        self.optimizer.step(active=active)
        if not self.is_whole:
            release(self.weights)
        self.state.write_through()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.state is not None:
            self.state.delta.grad = None


class SparseEngine(DeepSpeedEngine):
    """A `DeepSpeedEngine` over a frozen ZeRO-3 model whose optimizer trains a `SparseState`.

    Attributes:
        gathers: what ZeRO-3 gathers.
    """

    gathers: GatherCounter

    def _configure_zero_optimizer(self, optimizer):
        return SparseZeroOptimizer(super()._configure_zero_optimizer(None))

    def attach(
        self,
        state: SparseState,
        optimizer: FlatOptimizer,
        lr_scheduler,
        clip: Clip,
        on_gradient: OnGradient | None = None,
    ) -> None:
        """Give the engine what it trains, at the start and after every change of the mask.

        Args:
            on_gradient: sees the summed gradient [num_local] of this rank's entries before each step, and
                says which of them step ([num_local] bool; None: all).
        """
        parameters = dict(self.module.named_parameters())
        weights = [parameters[name] for name in state.trained.shape]
        self.optimizer.attach(state, optimizer, clip, on_gradient, weights)
        self.lr_scheduler = lr_scheduler
        # Backwards may end elsewhere from here on: ZeRO-3 must not prefetch for the layers below.
        coordinator = self.optimizer.offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def after_plain_backward(self) -> None:
        """What the engine does after its own backward, for a `loss.backward()` that it did not run."""
        self.optimizer.backward_epilogue()


def release(parameters: list[nn.Parameter]) -> None:
    """Free gathered copies of these weights: their shards are about to change, a copy would be stale."""
    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.INFLIGHT:
            raise RuntimeError(f"{parameter.ds_summary()} is being gathered while its shard changes")
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.ds_active_sub_modules.clear()
            parameter.partition()


def build_engine(
    model: nn.Module, ds_config: dict, targets: dict[str, nn.Linear], walks_all_layers: bool = False
) -> SparseEngine:
    """A `SparseEngine` over a frozen model; targeted weights are never kept whole.

    Args:
        model: frozen, loaded under `zero.Init`.
        ds_config: as `ds_config.load_ds_config` returns it.
        targets: weight name -> linear, of all that is trained.
        walks_all_layers: have a backward go down to the embedding, not just to the lowest layer that is
            trained: where that is another one every step, or inputs must need a gradient (re-entrant
            activation checkpointing).
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the base must be frozen: call requires_grad_(False) on the model")
    config = DeepSpeedConfig(ds_config)
    engine = SparseEngine(args=None, model=model, config=ds_config, config_class=config)
    itemsize = next(model.parameters()).element_size()
    engine.gathers = GatherCounter(engine.optimizer.offload.get_param_coordinator(), itemsize)
    # Small weights stay gathered ("persistent") and would go stale when their shard changes.
    for linear in targets.values():
        linear.weight.ds_persist = False
    offload = engine.optimizer.offload
    offload.persistent_parameters = [p for p in offload.persistent_parameters if p.ds_persist]
    is_here = all(shard_of(p).device.type == engine.device.type for p in model.parameters())
    if collectives.world_size() == 1 and is_here:
        engine.optimizer.keep_whole()
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


def _sum_apart(module: nn.Module, inputs: tuple) -> tuple:
    # What a module's own uses of its input add up to is added to what others' do, as behind ZeRO-3's hooks:
    # scores have the same bits on one rank as on several.
    return tuple(torch.ops.aten.alias(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Of a slice of the positions, torch multiplies a copy of the vocabulary's weight for every row.
    return tuple(x.contiguous() for x in inputs)
