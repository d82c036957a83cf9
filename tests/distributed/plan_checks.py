"""What runs on the ranks to compare a plan with: gathers counted inside DeepSpeed, buffers as allocated."""

from __future__ import annotations

from collections import Counter

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from distributed.reference import make_trainer
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.tools.plan.gathered_weights import BACKWARD, FORWARD, RECOMPUTE
from speft_ds.training import memory

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"
AVAILABLE = "_PartitionedParameterCoordinator__n_available_params"  # gathered since the forward began


class GatherCounter:
    """Counts what an engine's ZeRO-3 gathers, by patching DeepSpeed's private methods.

    Attributes:
        elements: kind -> elements gathered since `restart`.
        sent: kind -> bytes of its own shards that this rank sent to the others for that.
        most_gathered: the most elements gathered at a time, without those that always stay so.
    """

    def __init__(self, engine):
        self.restart()
        coordinator = engine.optimizer.offload.get_param_coordinator()
        gather, fetch = getattr(coordinator, GATHER), coordinator.fetch_sub_module

        def counted_gather(weights, forward, quantize=False):
            weights = list(weights)
            self._count([w for w in weights if w.ds_status == ZeroParamStatus.NOT_AVAILABLE], forward)
            return gather(weights, forward, quantize)

        def counted_fetch(module, forward):
            fetch(module, forward)
            self.most_gathered = max(self.most_gathered, getattr(coordinator, AVAILABLE))

        setattr(coordinator, GATHER, counted_gather)
        coordinator.fetch_sub_module = counted_fetch

    def restart(self) -> None:
        self.elements: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.most_gathered = 0

    def _count(self, weights: list[nn.Parameter], forward: bool) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        kind = BACKWARD if not forward else RECOMPUTE if in_backward else FORWARD
        for weight in weights:
            self.elements[kind] += weight.ds_numel
            self.sent[kind] += weight.ds_tensor.nbytes * (weight.ds_zero_partition_world_size - 1)


def check_run(recipe: Recipe) -> dict:
    """A run, what it says of its own resources, and what this rank gathered and sent in the last step.

    By then DeepSpeed knows the order of the modules.
    """
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    gathers, reduced = GatherCounter(trainer.engine), []
    train_step, reduce_scatter = trainer.train_step, collectives.start_reduce_scatter

    def counted_step(step: int) -> dict:
        gathers.restart()
        reduced.clear()
        return train_step(step)

    def counted_reduce(pieces):
        reduced.append(pieces.nbytes * (collectives.world_size() - 1) // collectives.world_size())
        return reduce_scatter(pieces)

    trainer.train_step, collectives.start_reduce_scatter = counted_step, counted_reduce
    try:
        trainer.train()
    finally:
        collectives.start_reduce_scatter = reduce_scatter
    return {
        **trainer.resources[collectives.rank()],
        "num_own": trainer.state.num_local,
        "gathered": {kind: gathers.elements[kind] for kind in (FORWARD, RECOMPUTE, BACKWARD)},
        "most_gathered": gathers.most_gathered,
        "sent": {f"weights, {kind}": count for kind, count in gathers.sent.items()},
        "reduced": sum(reduced),
    }


def check_memory(recipe: Recipe) -> dict[str, int]:
    """Peak bytes of this process while it scores and while it trains; a fresh process measures best."""
    trainer = make_trainer(recipe)
    memory.reset_peak()
    trainer.choose_mask()
    scoring = memory.peak_bytes()
    memory.reset_peak()
    trainer.engine.train()
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    return {"scoring": scoring, "training": memory.peak_bytes()}
