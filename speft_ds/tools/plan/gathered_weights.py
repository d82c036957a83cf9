"""Gathered weights: which ones ZeRO-3 holds at each use of a module, and how many it communicates.

DeepSpeed's rules (partitioned_param_coordinator.py) over the order in which a pass uses its modules. Its
limits count elements, of whatever size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from speft_ds.tools.plan.stored_weights import Parameter, Storage, count_elements, num_bytes

if TYPE_CHECKING:
    from speft_ds.tools.plan.setup import Setup

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"


@dataclass
class ModuleUse:
    """One use of a module in a pass, up to the next one.

    Attributes:
        kind: `forward`, `backward`, or `recompute`: a forward inside the backward (checkpointing).
        weights: names of the module's own weights.
        peak: bytes of activations, at most.
        ended: (kind, module) of the uses that end before the next one begins, in order.
    """

    kind: str
    module: str
    weights: tuple[str, ...]
    peak: int
    ended: list[tuple[str, str]] = field(default_factory=list)


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


class Coordinator:
    """What DeepSpeed gathers and releases in passes of one order of uses, one after the other.

    The first pass records the order: nothing is prefetched, all is released. In the second one, persistent
    weights that are not there yet are gathered with the others, and it is decided for all later ones what the
    end of a use releases (`__params_to_release` is cached).

    Attributes:
        gathered: weights that are gathered, or on their way, but for the persistent ones of earlier passes.
        in_flight: those of them that are on their way.
        held: elements of `gathered`, by kind.
    """

    def __init__(self, uses: list[ModuleUse], setup: Setup, storage: Storage):
        self.uses = uses
        self.bucket = setup.zero_value("prefetch_bucket_size")
        self.max_live = setup.zero_value("max_live_parameters")
        self.reuse_distance = setup.zero_value("max_reuse_distance")
        self.own = [storage.parameters(use.weights) for use in uses]
        self.own_of = {use.module: own.keys() for use, own in zip(uses, self.own, strict=True)}
        self.small = {name for own in self.own for name, one in own.items() if setup.is_persistent(one)}
        # Elements used before a step, and the steps that use a weight.
        self.passed = [0, *accumulate(sum(one.numel for one in own.values()) for own in self.own)]
        self.steps_of: dict[str, list[int]] = defaultdict(list)
        for step, own in enumerate(self.own):
            for name in own:
                self.steps_of[name].append(step)
        self.released_with: dict[tuple[str, int], set[str]] = {}
        self.gathered: dict[str, Parameter] = {}
        self.persistent: set[str] = set()

    def start_pass(self, is_recording: bool) -> None:
        self.is_recording = is_recording
        self.persistent |= self.gathered.keys() & self.small
        self.gathered, self.in_flight, self.held = {}, set(), Counter()
        self.queue = deque((step, name) for step, own in enumerate(self.own) for name in own)
        self.fetched_for = dict.fromkeys(self.steps_of, -1)  # the last step that a weight was fetched for
        self.users: dict[str, set[str]] = defaultdict(set)  # weight -> modules that hold it
        self.recomputed: dict[str, set[str]] = {}  # module in its backward -> weights recomputed meanwhile

    def fetch(self, step: int) -> None:
        """At the start of a use: gather what its module needs, and prefetch a bucket of what comes next."""
        use, own = self.uses[step], self.own[step]
        if use.kind == BACKWARD:
            self.recomputed.setdefault(use.module, set())
        for name, one in own.items():
            self._gather(name, one)
            self.users[name].add(use.module)
            if use.kind == RECOMPUTE and self.recomputed:  # goes with the innermost backward
                owner = next(reversed(self.recomputed))
                self.recomputed[owner].add(name)
                self.users[name].add(owner)
        self.in_flight -= own.keys()
        for _ in [name for name in own if self.fetched_for[name] < step]:
            self._next_in_queue()
        room = 0 if self.is_recording else min(self.max_live - self.held.total(), self.bucket)
        while self.queue and room > 0:
            name, one = self._next_in_queue()
            if self._gather(name, one):
                self.in_flight.add(name)
                room -= one.numel

    def _gather(self, name: str, one: Parameter) -> bool:
        """Whether it was not there."""
        if name in self.gathered or name in self.persistent:
            return False
        self.gathered[name] = one
        self.held += count_elements([one])
        return True

    def _next_in_queue(self) -> tuple[str, Parameter]:
        step, name = self.queue.popleft()
        self.fetched_for[name] = step
        return name, self.own[step][name]

    def release(self, kind: str, module: str, step: int) -> None:
        """At the end of a use, before that of number `step`: release what is not needed soon."""
        own = self.own_of[module]
        recomputed = self.recomputed.pop(module, set()) if kind == BACKWARD else set()
        for name in own | recomputed:
            self.users[name].discard(module)
        if not self.is_recording:
            if (module, step) not in self.released_with:
                far = {name for name in own - self.small if self._is_far(name, step)}
                self.released_with[module, step] = far
            own = self.released_with[module, step]
        for name in (own | (recomputed - self.small)) & self.gathered.keys() - self.in_flight:
            if not self.users[name]:
                self.held -= count_elements([self.gathered.pop(name)])

    def _is_far(self, name: str, step: int) -> bool:
        """Whether a weight was not fetched for later uses, nor is used within the reuse distance."""
        steps = self.steps_of[name]
        place = bisect_left(steps, step)
        is_near = place < len(steps) and self.passed[steps[place]] - self.passed[step] < self.reuse_distance
        return self.fetched_for[name] <= step and not is_near


def pass_peak(uses: list[ModuleUse], setup: Setup, storage: Storage) -> PassPeak:
    """The peak of activations and gathered weights together, of a pass with these uses in order of time."""
    decoded = [sum(storage.decoded_bytes(name, setup.device) for name in use.weights) for use in uses]
    if not setup.is_partitioned:  # its shards are the complete weights
        peak = PassPeak()
        for use, one in zip(uses, decoded, strict=True):
            peak.keep_larger(use.peak, one, Counter())
        return peak
    coordinator = Coordinator(uses, setup, storage)
    for is_recording in (True, False, False):  # all later ones are like the third
        coordinator.start_pass(is_recording)
        peak = _run(coordinator, decoded, setup.device)
    return peak


def _run(coordinator: Coordinator, decoded: list[int], device: str) -> PassPeak:
    """One pass; `decoded` are bytes at each use."""
    peak = PassPeak()
    for step, use in enumerate(coordinator.uses):
        before = Counter(coordinator.held)
        coordinator.fetch(step)
        held = Counter(coordinator.held)
        peak.traffic[use.kind] += held - before
        peak.most_gathered = max(peak.most_gathered, held.total())
        in_flight = [coordinator.gathered[name] for name in coordinator.in_flight]
        if device == "cpu" and in_flight:  # gloo assembles each result in a buffer of its own
            held += count_elements([max(in_flight, key=lambda one: one.nbytes)])
        peak.keep_larger(use.peak, decoded[step], held)
        for kind, module in use.ended:
            coordinator.release(kind, module, step + 1)
    return peak
