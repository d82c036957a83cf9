"""Gathered weights: which ones ZeRO-3 holds at each use of a module, and how many it communicates.

DeepSpeed's rules (partitioned_param_coordinator.py) over the order in which a pass uses its modules: a use
gathers what the module needs and prefetches a bucket of what comes next; after it, a weight is released
unless it was prefetched for a later use, or is needed again within `stage3_max_reuse_distance`. Its limits
count elements, of whatever size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from speft_ds.tools.plan.stored_weights import Parameter, Storage, count_elements, num_bytes

if TYPE_CHECKING:
    from speft_ds.tools.plan.setup import Setup

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"


@dataclass
class ModuleUse:
    """One use of a module in a pass, up to the next one."""

    kind: str  # `forward`, `backward`, or `recompute`: a forward inside the backward (checkpointing)
    weights: tuple[str, ...]  # names of the module's own weights
    peak: int  # bytes of activations, at most


@dataclass
class PassPeak:
    """The moment of a pass that takes most memory, and what the pass gathers. Elements are counted by kind.

    Attributes:
        activations, decoded: bytes at that moment; `decoded` of a weight in few bits, as its module uses it.
        gathered: elements at that moment.
        traffic: kind of use -> elements gathered.
        most_gathered: elements at a time, of any kind, without persistent weights and buffers.
    """

    activations: int = 0
    decoded: int = 0
    gathered: Counter = field(default_factory=Counter)
    traffic: dict[str, Counter] = field(
        default_factory=lambda: {FORWARD: Counter(), RECOMPUTE: Counter(), BACKWARD: Counter()}
    )
    most_gathered: int = 0

    @property
    def num_bytes(self) -> int:
        return self.activations + self.decoded + num_bytes(self.gathered)

    def keep_larger(self, activations: int, decoded: int, gathered: Counter) -> None:
        """Take this moment, if more is alive."""
        if activations + decoded + num_bytes(gathered) > self.num_bytes:
            self.activations, self.decoded, self.gathered = activations, decoded, gathered


def pass_peak(uses: list[ModuleUse], setup: Setup, storage: Storage) -> PassPeak:
    """The peak of activations and gathered weights together, of a pass with these uses in order of time."""
    peak = PassPeak()
    decoded = [sum(storage.decoded_bytes(name, setup.device) for name in use.weights) for use in uses]
    if not setup.is_partitioned:  # its shards are the complete weights
        for use, one in zip(uses, decoded, strict=True):
            peak.keep_larger(use.peak, one, Counter())
        return peak
    own = [storage.parameters(use.weights) for use in uses]
    passed = [0, *accumulate(sum(parameter.numel for parameter in each.values()) for each in own)]
    own = [{name: one for name, one in each.items() if not setup.is_persistent(one)} for each in own]
    queue = [name for each in own for name in each]
    step_of = [step for step, each in enumerate(own) for _ in each]
    ends = [*accumulate(map(len, own))]
    next_place = _next_places(queue)
    bucket, max_live = setup.zero_value("prefetch_bucket_size"), setup.zero_value("max_live_parameters")
    reuse_distance = setup.zero_value("max_reuse_distance")
    # Non-reentrant checkpointing recomputes a layer inside the backward of its last module, and releases what
    # that gathers with this module; reentrant checkpointing, with the layer.
    recomputes_in_backward = setup.recipe.train.activation_checkpointing == "non_reentrant"
    ahead = 0  # what stands before it in the queue is gathered, or on its way
    gathered: dict[str, Parameter] = {}
    in_flight: set[str] = set()
    recomputed: set[str] = set()
    for step, use in enumerate(uses):
        recomputes_next = step + 1 < len(uses) and uses[step + 1].kind == RECOMPUTE
        leaves_layer = recomputes_next or not recomputed.issuperset(own[step])
        if use.kind == BACKWARD and (recomputes_in_backward or leaves_layer):
            gathered = {name: one for name, one in gathered.items() if name not in recomputed}
            recomputed = set()
        before = count_elements(gathered.values())
        gathered |= own[step]
        in_flight -= own[step].keys()
        room = min(max_live - _numel(gathered), bucket)
        ahead = max(ahead, ends[step])
        while ahead < len(queue) and room > 0:
            name = queue[ahead]
            if name not in gathered:
                gathered[name] = own[step_of[ahead]][name]
                in_flight.add(name)
                room -= gathered[name].numel
            ahead += 1
        held = count_elements(gathered.values())
        peak.traffic[use.kind] += held - before
        peak.most_gathered = max(peak.most_gathered, held.total())
        if setup.device == "cpu" and in_flight:  # gloo assembles each result in a buffer of its own
            held += count_elements([max((gathered[name] for name in in_flight), key=lambda one: one.nbytes)])
        peak.keep_larger(use.peak, decoded[step], held)
        if use.kind == RECOMPUTE or (recomputes_in_backward and recomputes_next):
            recomputed.update(own[step])
        for name, place in zip(own[step], range(ends[step] - len(own[step]), ends[step]), strict=True):
            again = next_place[place]
            is_near = again < len(queue) and passed[step_of[again]] - passed[step + 1] < reuse_distance
            if not (again < ahead or is_near or name in recomputed):
                del gathered[name]
    return peak


def _numel(parameters: dict[str, Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters.values())


def _next_places(queue: list[str]) -> list[int]:
    """For each place in the queue: the next one of the same name, or the queue's length."""
    found, later = [], {}
    for place in reversed(range(len(queue))):
        found.append(later.get(queue[place], len(queue)))
        later[queue[place]] = place
    return found[::-1]
