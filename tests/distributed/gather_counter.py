"""What ZeRO-3 gathers in a step: elements by kind, and the most that are gathered at a time.

Patches DeepSpeed's private methods, which only tests may.
"""

from __future__ import annotations

from collections import Counter

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from speft_ds.tools.plan.gathered_weights import BACKWARD, FORWARD, RECOMPUTE

_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"
_AVAILABLE = (
    "_PartitionedParameterCoordinator__n_available_params"  # elements gathered since the forward began
)


class GatherCounter:
    """Counts what an engine's coordinator gathers from here on.

    Attributes:
        elements: kind -> elements gathered since `restart`.
        sent: kind -> bytes of its own shards that this rank sent to the others for that.
        most_gathered: the most elements gathered at a time, without those that always stay so.
    """

    def __init__(self, engine):
        self.restart()
        coordinator = engine.optimizer.offload.get_param_coordinator()
        gather, fetch = getattr(coordinator, _GATHER), coordinator.fetch_sub_module

        def counted_gather(weights, forward, quantize=False):
            weights = list(weights)
            self._count([w for w in weights if w.ds_status == ZeroParamStatus.NOT_AVAILABLE], forward)
            return gather(weights, forward, quantize)

        def counted_fetch(module, forward):
            fetch(module, forward)
            self.most_gathered = max(self.most_gathered, getattr(coordinator, _AVAILABLE))

        setattr(coordinator, _GATHER, counted_gather)
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
