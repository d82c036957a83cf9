"""What a step asks of a device, counted on a CPU: host reads, collectives, writes to shards."""

from __future__ import annotations

import traceback
from collections import Counter

import deepspeed.comm
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.checks import check_run
from distributed.reference import make_trainer, start
from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.training import setup
from speft_ds.zero import shards

# Operations for whose result the host waits.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}
ON_CPU = {"collate", "permutation"}  # functions whose tensors are on the CPU anyway
COLLECTIVES = (
    *("all_reduce", "all_gather_into_tensor", "all_gather_single", "all_gather", "all_to_all_single"),
    *("reduce_scatter_tensor", "reduce_scatter_single", "broadcast", "gather", "scatter", "barrier"),
)


class HostReads(TorchDispatchMode):
    """Counts them by the function that asks, of ours or of transformers."""

    def __init__(self):
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_") else ()
        if name in READS or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.count()
        return function(*args, **(kwargs or {}))

    def count(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        names = [frame.name for frame in frames if frame.filename != __file__]
        if not ON_CPU & set(names):
            self.by[names[-1]] += 1


def count_reads(recipe: Recipe) -> dict[str, int]:
    """Function -> host reads that it asked for in a step, once the run is warm."""
    trainer = start(recipe)
    trainer.train_step(0)
    tolist = torch.Tensor.tolist
    with HostReads() as reads:
        torch.Tensor.tolist = lambda tensor: (
            reads.count() or tolist(tensor)
        )  # of a CPU's no operation is seen
        try:
            trainer.train_step(1)
        finally:
            torch.Tensor.tolist = tolist
    return dict(reads.by)


def record_collectives(recipe: Recipe) -> dict[str, list[tuple[str, int]]]:
    """Group -> (collective, elements) in the order in which this rank called them, over a run's steps."""
    calls: dict[str, list[tuple[str, int]]] = {}
    trainer = start(recipe)
    kept = []

    def watch(module, name: str) -> None:
        original = getattr(module, name, None)
        if original is None:
            return
        kept.append((module, name, original))

        def watched(*args, **kwargs):
            group = kwargs.get("group")
            key = "ours" if group not in (None, dist.group.WORLD) else "all"
            sizes = [value.numel() for value in args if isinstance(value, torch.Tensor)]
            calls.setdefault(key, []).append((name, sum(sizes)))
            return original(*args, **kwargs)

        setattr(module, name, watched)

    for name in COLLECTIVES:
        watch(dist, name)
        watch(deepspeed.comm, name)
    for name in ("_reduce_scatter", "_all_gather"):
        watch(collectives, name)
    try:
        for step in range(recipe.train.steps):
            trainer.train_step(step)
    finally:
        for module, name, original in reversed(kept):
            setattr(module, name, original)
    return calls


class GatherStream:
    """Stands for the stream that ZeRO-3 gathers on: knows what every shard was when it last waited."""

    def __init__(self):
        self.versions: dict[int, int] = {}
        self.shards: list[torch.Tensor] = []
        self.num_writes = 0

    def wait_stream(self, stream) -> None:
        now = {id(shard): shard._version for shard in self.shards}
        self.num_writes += sum(version != self.versions.get(key) for key, version in now.items())
        self.versions = now

    def check(self, module: torch.nn.Module, inputs) -> None:
        for parameter in module.parameters(recurse=False):
            if (shard := getattr(parameter, "ds_tensor", None)) is not None and id(shard) in self.versions:
                assert shard._version == self.versions[id(shard)], f"a gather of {type(module)} does not wait"


def check_gathers_wait(recipes: list[Recipe]) -> list[int]:
    """No shard changes without that gathers wait for it; the number of changes that were seen in each run."""
    seen, real = [], shards.gather_stream
    for recipe in recipes:
        stream = GatherStream()
        forward = torch.nn.modules.module.register_module_forward_pre_hook(stream.check)
        try:
            trainer = make_trainer(recipe)
            stream.shards = [parameter.ds_tensor for parameter in trainer.engine.module.parameters()]
            stream.wait_stream(None)
            stream.num_writes, shards.gather_stream = 0, stream
            trainer.choose_mask()
            for step in range(recipe.train.steps):
                trainer.train_step(step)
        finally:
            forward.remove()
            shards.gather_stream = real
        seen.append(stream.num_writes)
    return seen


def check_keeps(recipe: Recipe) -> dict:
    """A run that is checked as all are, whose single rank keeps its weights or not, as the recipe says."""
    keeps = recipe.deepspeed.keep_unpartitioned
    seen, build = [], setup.build_engine

    def built(*arguments):
        seen.append(build(*arguments))
        return seen[-1]

    setup.build_engine = built
    try:
        made = check_run(recipe)
    finally:
        setup.build_engine = build
    (engine,) = seen
    assert engine.optimizer.is_unpartitioned == keeps, "the weights are kept otherwise"
    return made
