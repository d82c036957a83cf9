"""What runs on the ranks to compare a plan with: gathers counted inside DeepSpeed, buffers as allocated."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import getclosurevars
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from distributed.reference import make_trainer
from speft_ds.schema import Recipe

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


class GatherCounter:
    """Elements that the coordinator gathers, by kind, and the most that are whole at a time."""

    def __init__(self, parameters: list):
        self.parameters = parameters
        self.restart()

    def restart(self) -> None:
        self.traffic = {"forward": 0, "recompute": 0, "backward": 0}
        self.most = 0

    def install(self) -> None:
        coordinator = PartitionedParameterCoordinator
        gather, fetch = getattr(coordinator, GATHER), coordinator.fetch_sub_module

        def counted_gather(this, weights, forward, quantize=False):
            weights = list(weights)
            recompute = forward and torch._C._current_graph_task_id() != -1
            missing = [w for w in weights if w.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            kind = "recompute" if recompute else "forward" if forward else "backward"
            self.traffic[kind] += sum(w.ds_numel for w in missing)
            return gather(this, weights, forward, quantize)

        def counted_fetch(this, module, forward):
            fetch(this, module, forward)
            gone = ZeroParamStatus.NOT_AVAILABLE
            whole = [w for w in self.parameters if w.ds_status != gone and not w.ds_persist]
            self.most = max(self.most, sum(w.ds_numel for w in whole))

        setattr(coordinator, GATHER, counted_gather)
        coordinator.fetch_sub_module = counted_fetch
        self.undo = [(coordinator, GATHER, gather), (coordinator, "fetch_sub_module", fetch)]

    def remove(self) -> None:
        for owner, name, original in self.undo:
            setattr(owner, name, original)


def check_gathers(recipe: Recipe) -> dict:
    """Gathers of one step of one micro-batch, once DeepSpeed knows the order of the modules."""
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    trainer.engine.train()
    counter = GatherCounter(list(trainer.engine.module.parameters()))
    counter.install()
    try:
        for step in range(recipe.train.steps):
            counter.restart()
            trainer.train_step(step)
    finally:
        counter.remove()
    return {"traffic": counter.traffic, "most": counter.most}


def check_memory(recipe: Recipe) -> dict[str, int]:
    """Peak bytes of this process while it scores and while it trains; a fresh process measures best."""
    trainer = make_trainer(recipe)
    restart_peak()
    trainer.choose_mask()
    scoring = peak_memory()
    restart_peak()
    trainer.engine.train()
    for step in range(recipe.train.steps):
        trainer.train_step(step)
    return {"scoring": scoring, "training": peak_memory()}


def restart_peak() -> None:
    """From here on, `peak_memory` forgets what was before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes resident in this process since `restart_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def check_buffers(recipe: Recipe) -> dict:
    """Bytes of what this rank allocated, by the plan's kinds.

    Returns:
        kind -> bytes; `own`: entries of this rank; `by rank`: kind -> (bytes, bytes an entry) of what depends
        on how many entries this rank has.
    """
    trainer = make_trainer(recipe)
    trainer.choose_mask()
    state, parameters = trainer.state, list(trainer.engine.module.parameters())
    moments = trainer.engine.optimizer.optimizer.state[state.delta]
    patterns = [
        getclosurevars(sink).nonlocals["backend"].pattern
        for name, sink in state.gradient.sinks.items()
        if state.gradient.backends[name] == "sampled"
    ]
    csr = [tensor for p in patterns for tensor in (p.crow_indices(), p.col_indices(), p.values())]
    persistent = [w for w in parameters if w.ds_persist and w.ds_zero_partition_world_size > 1]
    by_rank = {
        "index": (num_bytes(state.index.values()), 4),
        "base values": (num_bytes([state.base]), state.base.itemsize),
        "delta": (num_bytes([state.delta]), 4),
        "Adam moments": (num_bytes([moments["exp_avg"], moments["exp_avg_sq"]]), 8),
    }
    if moments["age"].dim():
        by_rank["ages"] = (num_bytes([moments["age"]]), 4)
    return {
        "own": state.num_local,
        "by rank": by_rank,
        "mask": num_bytes(trainer.mask.index.values()),
        "gradient pattern": num_bytes(csr),
        "base shard": num_bytes(weight.ds_tensor for weight in parameters),
        "small weights, whole": sum(weight.ds_numel * weight.element_size() for weight in persistent),
    }


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
