"""Gathered weights: which ones ZeRO-3 holds at each use of a module, and how many it communicates.

DeepSpeed's rules (partitioned_param_coordinator.py) over the order in which a pass uses its modules: a use
gathers what the module needs and prefetches a bucket of what comes next; after it, a weight is released
unless it was prefetched for a later use, or is needed again within `stage3_max_reuse_distance`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speft_ds.tools.plan.memory_model import Setup

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"


@dataclass
class ModuleUse:
    """One use of a module in a pass, up to the next one."""

    kind: str  # `forward`, `backward`, or `recompute`: a forward inside the backward (checkpointing)
    weights: tuple[str, ...]  # names of the module's own weights
    peak: int  # bytes of activations, at most


@dataclass
class PassPeak:
    """The moment of a pass that takes most memory, and what the pass gathers."""

    activations: int = 0  # bytes at that moment
    gathered: int = 0  # bytes at that moment
    traffic: dict[str, int] = field(
        default_factory=lambda: {FORWARD: 0, RECOMPUTE: 0, BACKWARD: 0}
    )  # elements
    most_gathered: int = 0  # elements at a time, without persistent weights and buffers


def pass_peak(uses: list[ModuleUse], setup: Setup) -> PassPeak:
    """The peak of activations and gathered weights together, of a pass with these uses in order of time."""
    if not setup.is_partitioned:  # its shards are the complete weights
        return PassPeak(activations=max(use.peak for use in uses))
    numel, persistent = setup.geometry.numel, setup.persistent
    bucket, max_live = setup.zero_value("prefetch_bucket_size"), setup.zero_value("max_live_parameters")
    reuse_distance = setup.zero_value("max_reuse_distance")
    # Non-reentrant checkpointing recomputes a layer inside the backward of its last module, and releases what
    # that gathers with this module; reentrant checkpointing, with the layer.
    recomputes_in_backward = setup.recipe.train.activation_checkpointing == "non_reentrant"
    own = [[name for name in use.weights if name not in persistent] for use in uses]
    passed = [0, *accumulate(sum(numel[name] for name in use.weights) for use in uses)]
    next_use = _next_uses(own)
    peak, ahead = PassPeak(), 0  # the uses before `ahead` have what they need gathered, or on its way
    gathered: dict[str, int] = {}  # weight -> elements
    in_flight: set[str] = set()
    recomputed: set[str] = set()
    for step, use in enumerate(uses):
        recomputes_next = step + 1 < len(uses) and uses[step + 1].kind == RECOMPUTE
        leaves_layer = recomputes_next or not recomputed.issuperset(own[step])
        if use.kind == BACKWARD and (recomputes_in_backward or leaves_layer):
            gathered = {name: count for name, count in gathered.items() if name not in recomputed}
            recomputed = set()
        before = sum(gathered.values())
        gathered |= {name: numel[name] for name in own[step]}
        in_flight -= set(own[step])
        room = min(max_live - sum(gathered.values()), bucket)
        ahead = max(ahead, step + 1)
        while ahead < len(uses) and room > 0:
            prefetched = {name: numel[name] for name in own[ahead] if name not in gathered}
            gathered |= prefetched
            in_flight |= prefetched.keys()
            room -= sum(prefetched.values())
            ahead += 1
        held = sum(gathered.values())
        peak.traffic[use.kind] += held - before
        peak.most_gathered = max(peak.most_gathered, held)
        if setup.device == "cpu":  # gloo assembles each result in a buffer of its own
            held += max((numel[name] for name in in_flight), default=0)
        if use.peak + held * setup.itemsize > peak.activations + peak.gathered:
            peak.activations, peak.gathered = use.peak, held * setup.itemsize
        if use.kind == RECOMPUTE or (recomputes_in_backward and recomputes_next):
            recomputed.update(own[step])
        for name, again in next_use[step].items():
            is_near = again < len(uses) and passed[again] - passed[step + 1] < reuse_distance
            if not (again < ahead or is_near or name in recomputed):
                del gathered[name]
    return peak


def _next_uses(own: list[list[str]]) -> list[dict[str, int]]:
    """For each use: weight -> the step of its next use, or the number of steps."""
    found, later = [], {}
    for step, names in reversed([*enumerate(own)]):
        found.append({name: later.get(name, len(own)) for name in names})
        later |= dict.fromkeys(names, step)
    return found[::-1]
