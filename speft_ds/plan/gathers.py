"""Which weights ZeRO-3 holds whole at what time of a step, played through without a GPU or a weight.

`dry_run` marks where a pass fetches and releases the weights of a module. `simulate` follows DeepSpeed's
rules over the marks (partitioned_param_coordinator.py, once its trace is complete): a fetch gathers what the
module needs and prefetches a bucket of what comes next; a release keeps what is needed again within
`stage3_max_reuse_distance`. Imports no torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

BACKWARD, RECOMPUTE, FORWARD = "backward", "recompute", "forward"


@dataclass
class Moment:
    """From one mark of a pass to the next.

    Attributes:
        kind: `fetch` or `release`, of the weights of module number `module`.
        is_backward: the mark of a backward.
        is_recompute: the mark of a forward inside a backward (activation checkpointing).
        start, peak: bytes of activations alive at the mark, and at most until the next.
    """

    kind: str
    module: int
    is_backward: bool
    is_recompute: bool
    start: int
    peak: int = 0


@dataclass
class Trace:
    """A forward and backward as ZeRO-3 sees it.

    Attributes:
        names: of the weights, by number; a tied one has one number.
        owned: module number -> numbers of its own weights.
        moments: in order of time.
    """

    names: list[str]
    owned: dict[int, list[int]]
    moments: list[Moment]


@dataclass(frozen=True)
class GatherRules:
    """What decides when weights are gathered, in elements; see ds_configs/README.md.

    Attributes:
        persistent: weights that stay whole.
        targets: weights that a step changes.
        is_shared: more than one rank; a lone one uses its shards as they are, unless they are offloaded.
        on_cpu: collectives of gloo, which assembles the result of a call in a buffer of its own.
    """

    prefetch_bucket: int
    max_live: int
    reuse_distance: int
    persistent: frozenset[str]
    targets: frozenset[str]
    is_shared: bool
    on_cpu: bool


@dataclass
class Peak:
    """The moment of most memory, in bytes, and elements gathered over the whole pass.

    Attributes:
        activations, gathered: bytes at that moment.
        traffic: `forward`, `recompute`, `backward` -> elements gathered.
        most_whole: the most elements gathered or on the way after a fetch, without persistent weights and
            buffers.
    """

    activations: int = 0
    gathered: int = 0
    traffic: dict[str, int] = field(default_factory=lambda: {FORWARD: 0, RECOMPUTE: 0, BACKWARD: 0})
    most_whole: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gathered


class _Coordinator:
    """DeepSpeed's coordinator, with sizes for weights. Names follow it where there is a counterpart."""

    def __init__(self, trace: Trace, numel: dict[str, int], rules: GatherRules):
        self.trace, self.rules = trace, rules
        self.numel = [numel[name] for name in trace.names]
        self.persistent = {n for n, name in enumerate(trace.names) if name in rules.persistent}
        self.targets = {n for n, name in enumerate(trace.names) if name in rules.targets}
        self.order = [moment.module for moment in trace.moments if moment.kind == "fetch"]
        self.whole = set(self.persistent)  # weights that are gathered
        self.leaving: dict[tuple[int, int], set[int]] = {}  # as DeepSpeed caches it, over all passes
        self.users: list[set[int]] = [set() for _ in self.numel]  # modules that are using each weight
        self.traffic = Peak().traffic
        self.start_step()

    def start_step(self) -> None:
        """What DeepSpeed does at the start of each forward."""
        self.queue = deque((w, step) for step, m in enumerate(self.order) for w in sorted(self.owned(m)))
        self.fetched_for = [-1] * len(self.numel)  # step up to whose use each weight was looked after
        self.step, self.num_live = 0, 0
        self.bucket_of: dict[int, tuple[int, ...]] = {}  # weights in flight, and those gathered in one call
        self.buffers: dict[tuple[int, ...], set[int]] = {}  # such a call -> its weights not yet picked up
        self.arrived: set[tuple[int, ...]] = set()
        self.recomputed: dict[int, set[int]] = {}  # module -> weights that a recompute inside it fetched
        self.in_backward: dict[int, None] = {}
        self.most = 0  # elements held at most since the last mark

    def owned(self, module: int) -> set[int]:
        return set(self.trace.owned[module])

    def held(self) -> int:
        """Elements gathered now: whole weights, those on the way, and buffers, which outlive their copies."""
        whole = sum(self.numel[w] for w in self.whole - self.persistent)
        flying = [w for w, bucket in self.bucket_of.items() if bucket not in self.arrived]
        alone = sum(self.numel[w] for w in flying if self.bucket_of[w] not in self.buffers)
        calls = {self.bucket_of[w] for w in flying} if self.rules.on_cpu else ()
        assembled = max((sum(self.numel[w] for w in call) for call in calls), default=0)
        return whole + alone + assembled + sum(self.numel[w] for bucket in self.buffers for w in bucket)

    def num_whole(self) -> int:
        """Elements that are whole or on the way, as a fetch leaves them."""
        return sum(self.numel[w] for w in (self.whole | self.bucket_of.keys()) - self.persistent)

    def gather(self, weights: set[int], kind: str) -> None:
        missing = tuple(sorted(w for w in weights if w not in self.whole and w not in self.bucket_of))
        if not missing:
            return
        size = sum(self.numel[w] for w in missing)
        self.num_live += size
        self.traffic[kind] += size
        self.bucket_of |= dict.fromkeys(missing, missing)
        if len(missing) > 1:
            self.buffers[missing] = set(missing)
        self.most = max(self.most, self.held())

    def wait(self, weight: int) -> None:
        """Take one weight out of flight; the others of its call are whole from then on, too."""
        bucket = self.bucket_of.pop(weight, None)
        if bucket is None:
            return
        if bucket not in self.arrived:
            self.arrived.add(bucket)
            self.whole.update(bucket)
            self.most = max(self.most, self.held())
        if bucket in self.buffers:
            self.buffers[bucket].discard(weight)
            if not self.buffers[bucket]:
                del self.buffers[bucket]
        if bucket not in self.buffers:
            self.arrived.discard(bucket)

    def fetch(self, moment: Moment) -> None:
        kind = BACKWARD if moment.is_backward else RECOMPUTE if moment.is_recompute else FORWARD
        needed = self.owned(moment.module)
        if moment.is_backward:
            self.in_backward[moment.module] = None
        self.most = self.held()
        self.gather(needed, kind)
        for weight in sorted(needed):
            self.users[weight].add(moment.module)
            if moment.is_recompute and self.in_backward:
                owner = next(reversed(self.in_backward))
                self.recomputed.setdefault(owner, set()).add(weight)
                self.users[weight].add(owner)
            self.wait(weight)
        self._prefetch(needed, kind)
        self.step += 1

    def _prefetch(self, needed: set[int], kind: str) -> None:
        new = {weight for weight in needed if self.fetched_for[weight] < self.step}
        while self.queue and new:
            weight, step = self.queue.popleft()
            self.fetched_for[weight] = step
            new.discard(weight)
        room = min(self.rules.max_live - self.num_live, self.rules.prefetch_bucket)
        ahead: set[int] = set()
        while self.queue and sum(self.numel[w] for w in ahead) < room:
            weight, step = self.queue.popleft()
            self.fetched_for[weight] = max(self.fetched_for[weight], step)
            if weight not in self.whole and weight not in self.bucket_of:
                ahead.add(weight)
        self.gather(ahead, kind)

    def release(self, moment: Moment) -> None:
        module, weights = moment.module, self.owned(moment.module)
        leaving = self._not_needed_soon(module)
        if moment.is_backward:
            recomputed = self.recomputed.pop(module, set())
            weights, leaving = weights | recomputed, leaving | (recomputed - self.persistent)
            self.in_backward.pop(module, None)
        for weight in weights:
            self.users[weight].discard(module)
        self.free(leaving)
        self.most = self.held()

    def _not_needed_soon(self, module: int) -> set[int]:
        # DeepSpeed decides once for each module and step, in the first pass, and sticks to it.
        if (module, self.step) not in self.leaving:
            self.leaving[module, self.step] = self._decide(self.owned(module))
        return self.leaving[module, self.step]

    def _decide(self, weights: set[int]) -> set[int]:
        """Those that neither the prefetch counts on nor a module within the reuse distance needs."""
        leaving = {w for w in weights - self.persistent if self.fetched_for[w] <= self.step}
        distance = 0
        for module in self.order[self.step :]:
            if not leaving or distance >= self.rules.reuse_distance:
                break
            leaving -= self.owned(module)
            distance += sum(self.numel[w] for w in self.owned(module))
        return leaving

    def free(self, weights: set[int]) -> None:
        for weight in weights & self.whole:
            if not self.users[weight]:
                self.whole.discard(weight)
                self.num_live -= self.numel[weight]

    def finish(self) -> None:
        """Release what the modules hold whose backward never ended, such as the embedding's."""
        for module in list(self.in_backward):
            weights = self.owned(module) | self.recomputed.pop(module, set())
            for weight in weights:
                self.users[weight].discard(module)
            self.free(weights - self.persistent)
        # The step writes into the shards of the targets, so the engine lets go of their whole copies.
        for weight in self.targets:
            self.users[weight].clear()
        self.free(self.targets)


def simulate(trace: Trace, numel: dict[str, int], itemsize: int, rules: GatherRules) -> Peak:
    """The peak of activations and gathered weights together, of a pass that other passes came before.

    Args:
        numel: elements of every weight; itemsize: bytes of one.
    """
    peak = Peak()
    if not rules.is_shared:
        peak.activations = max(moment.peak for moment in trace.moments)
        return peak
    coordinator = _Coordinator(trace, numel, rules)
    for _ in range(2):  # the second pass begins with what the first one left
        peak = Peak()
        coordinator.start_step()
        coordinator.traffic = peak.traffic
        for moment in trace.moments:
            (coordinator.fetch if moment.kind == "fetch" else coordinator.release)(moment)
            peak.most_whole = max(peak.most_whole, coordinator.num_whole())
            for activations, gathered in (
                (moment.start, coordinator.most),
                (moment.peak, coordinator.held()),
            ):
                if activations + gathered * itemsize > peak.total:
                    peak.activations, peak.gathered = activations, gathered * itemsize
        coordinator.finish()
    return peak
