"""Gradient of what is trained, the mask's entries and whole weights, reduced to the ranks that own it.

The backward of a weight's product adds the weight's part. Neighbouring weights are a bucket. A bucket that
has all its parts becomes rows [world_size, longest], row r for rank r, which are reduce-scattered while the
backward goes on; the sum is added to the owner's gradient. So only a few buckets are alive at a time, and
what a rank owns over the micro-batches of a step. The work per weight does not grow with the ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError
from speft_ds.model.weight_grad_hooks import WeightGradHook
from speft_ds.sparse.kernels.backends import DEFAULT_TOKENS, Backend, make_backend, measured_cost
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.kernels.stacked import make_stacked
from speft_ds.sparse.kernels.torch_backends import RowsOfGradient, whole_gradient
from speft_ds.sparse.layout import Layout, RankShards
from speft_ds.sparse.mask import Mask
from speft_ds.sparse.tiles import Tiles

IN_FLIGHT = 2  # buckets under way between the ranks, at most


@dataclass(frozen=True)
class GradientOptions:
    """How a gradient is computed and collected."""

    backend: str = "auto"  # as `train.sparse_backend`
    granularity: str = "element"  # with `block_size`, what the mask was chosen by
    block_size: int = 1
    few_columns: bool = False  # the mask was chosen so that its entries lie in few columns
    bucket: int = 2**22  # entries of one reduce-scatter, over all ranks
    overlap: bool = True  # False reduces after the backward: any number of them may come before `finish`
    costs: KernelCosts | None = None  # what `auto` chooses by, the same on all ranks; None: rules of thumb
    num_tokens: int = DEFAULT_TOKENS  # of a micro-batch, at most

    @classmethod
    def of(cls, recipe: Recipe, costs: KernelCosts | None, overlap: bool = True) -> GradientOptions:
        """Those of a recipe; `overlap` only where `train.overlap` is set."""
        mask, train = recipe.mask, recipe.train
        how = (train.sparse_backend, mask.granularity, mask.block_size, mask.compute is not None)
        num_tokens = train.micro_batch * recipe.data.max_length
        return cls(*how, train.reduce_bucket, overlap and train.overlap, costs, num_tokens)


def gradient_cost(mask: Mask, recipe: Recipe, costs: KernelCosts, stacks: dict[str, int]) -> dict:
    """What the gradient of a mask should take on the device of the costs, for a report.

    Args:
        stacks: weight that is a stack -> matrices in it, each with its part of the tokens.
    Returns:
        `over_dense`: its time over that of the dense weight gradient; `backends` -> number of weights;
        `device`.
    """
    options = GradientOptions.of(recipe, costs)
    names, spent = Counter(), 0.0
    for name, index in mask.index.items():
        if index.numel():
            tiles = Tiles.of_mask(options.granularity, options.block_size, mask.shape[name], index)
            num_tokens = max(1, options.num_tokens // stacks.get(name, 1))
            backend, cost = measured_cost(index, mask.shape[name], tiles, costs, num_tokens)
            names[backend] += 1
            spent += cost * mask.numel(name)
    return {
        "over_dense": spent / mask.num_target_elements,
        "backends": dict(names.most_common()),
        "device": costs.device,
    }


class EntryBucket:
    """Entries of neighbouring weights, whose gradients are reduced in one call.

    Attributes:
        names: in the mask's order, so that each rank's part is one slice of its flat buffers.
        row_length: entries of the rank that has most.
        buffer: [entries] what was added and not sent yet, a weight after the other; None: nothing.
    """

    def __init__(self, names: list[str], layout: Layout, device: torch.device):
        self.names, self.buffer, self.device = names, None, device
        counts = torch.tensor([layout.counts(name) for name in names])  # [weights, ranks]
        self.lengths = counts.sum(0).tolist()  # rank -> its entries
        self.row_length = max(self.lengths)
        self.starts = layout.offsets[names[0]]  # rank -> where its slice starts
        flat = counts.flatten()
        in_buffer = (flat.cumsum(0) - flat).view_as(counts)
        in_rows = counts.cumsum(0) - counts + torch.arange(len(self.lengths)) * self.row_length
        ends = counts.sum(1).cumsum(0).tolist()
        self.places = {name: slice(a, b) for name, a, b in zip(names, [0, *ends], ends, strict=False)}
        # [weights x ranks] each part's entries, and how far it lies from the buffer's start in the rows.
        self.counts, self.moves = flat.to(device), (in_rows - in_buffer).flatten().to(device)

    def allocate(self) -> None:
        self.buffer = torch.zeros(sum(self.lengths), dtype=torch.float32, device=self.device)

    def add(self, name: str, values: Tensor) -> None:
        self.buffer[self.places[name]] += values

    def rows(self) -> Tensor:
        """[world_size, row_length] the buffer's entries as they are sent."""
        rows = self.buffer.new_zeros(len(self.lengths) * self.row_length)
        moves = self.moves.repeat_interleave(self.counts, output_size=self.buffer.numel())
        moves += torch.arange(self.buffer.numel(), device=self.device)
        return rows.index_copy_(0, moves, self.buffer).view(len(self.lengths), -1)

    def receive(self, own: Tensor, row: Tensor) -> None:
        """Add this rank's summed row to its gradient."""
        rank = collectives.rank()
        start, length = self.starts[rank], self.lengths[rank]
        own[start : start + length] += row[:length]


class WholeBucket:
    """The same of whole weights: a rank's row has its shards of them, padded as ZeRO-3 pads them.

    Attributes:
        buffer: [world_size, row_length] what was added and not sent yet, in rows; None: nothing.
    """

    def __init__(self, names: list[str], layout: Layout, device: torch.device):
        self.names, self.buffer, self.device = names, None, device
        self.world_size = collectives.world_size()
        sizes = [max(layout.counts(name)) for name in names]
        starts = list(accumulate(sizes, initial=0))
        self.row_length = starts[-1]
        self.columns = {name: slice(a, a + n) for name, a, n in zip(names, starts, sizes, strict=False)}
        self.own = {name: layout.places(name, collectives.rank()) for name in names}

    def allocate(self) -> None:
        shape = (self.world_size, self.row_length)
        self.buffer = torch.zeros(shape, dtype=torch.float32, device=self.device)

    def add(self, name: str, values: Tensor) -> None:
        columns = self.columns[name]
        size = columns.stop - columns.start
        num_full = values.numel() // size
        self.buffer[:num_full, columns] += values[: num_full * size].view(num_full, size)
        if rest := values.numel() - num_full * size:
            self.buffer[num_full, columns.start : columns.start + rest] += values[-rest:]

    def rows(self) -> Tensor:
        return self.buffer

    def receive(self, own: Tensor, row: Tensor) -> None:
        """Add this rank's summed row to its gradient."""
        for name, place in self.own.items():
            start = self.columns[name].start
            own[place] += row[start : start + place.stop - place.start]


Bucket = EntryBucket | WholeBucket


class SparseGradient:
    """Collects the gradient of a mask's entries, and of whole weights.

    A micro-batch's backward calls the hooks; `finish` must follow it. `pop` hands out what has come together
    and starts anew. All ranks call both together.

    Attributes:
        own: [num_local] fp32, the sum so far of this rank's entries.
        layout: where the entries lie.
        backends: weight with entries -> name of its backend; `kernels`: -> the backend.
        hooks: weight -> what its module calls in its backward; None where the mask has no entry of it.
        peak_buffer_bytes: bytes of buckets alive at once, at most.

    Args:
        mask: what is trained, the same on every rank.
        device: of the activations.
        num_stacked: weight that is a stack -> matrices in it: experts.
        whole: weight -> its matrix' shape: what is trained whole beside the mask.
        order: all of these weights in the order of the model; None: the mask's, then whole ones.
        rows: weight of the mask whose hook is called with its gradient -> [n] sorted, the rows that it has.
    """

    def __init__(
        self,
        mask: Mask,
        device: torch.device,
        options: GradientOptions,
        num_stacked: dict[str, int] | None = None,
        whole: dict[str, tuple[int, int]] | None = None,
        order: list[str] | None = None,
        rows: dict[str, Tensor] | None = None,
    ):
        self.mask, self.device, self.options, self.num_stacked = mask, device, options, num_stacked or {}
        self.world_size, rank = collectives.world_size(), collectives.rank()
        shapes = mask.shape | (whole or {})
        index = mask.index | dict.fromkeys(whole or {})  # None: all of the weight
        numel = {name: rows * columns for name, (rows, columns) in shapes.items()}
        layout = self.layout = Layout.of(index, numel, self.world_size)
        self.own = torch.zeros(layout.lengths[rank], dtype=torch.float32, device=device)
        self.own_slices = {name: layout.places(name, rank) for name in shapes}
        self.backends: dict[str, str] = {}
        self.kernels: dict[str, Backend] = {}
        rows = rows or {}
        self.hooks = {name: self._make_hook(name) for name in mask.shape if name not in rows}
        self.hooks |= {name: self._make_rows_hook(name, own.to(device)) for name, own in rows.items()}
        self.hooks |= {name: self._make_whole_hook(name) for name in whole or {}}
        order = [name for name in order or shapes if index[name] is None or index[name].numel()]
        self.buckets = self._make_buckets(order, whole or {}, rows)
        self.bucket_of = {name: bucket for bucket in self.buckets for name in bucket.names}
        # Uses of a weight in a backward: one, until the first backward has told.
        self.expected, self.is_profiling = dict.fromkeys(self.bucket_of, 1), options.overlap
        self.peak_buffer_bytes = 0
        self._start_backward()

    def in_words(self) -> str:
        """Which backends it takes, and what they were chosen by."""
        backends = Counter(self.backends.values()).most_common()
        if not backends:
            return "dense gradients of whole weights alone"
        parts = ", ".join(f"{name} ({count} weights)" for name, count in backends)
        wanted, costs = self.options.backend, self.options.costs
        why = f", as measured on {costs.device}" if costs else ", by a rule of thumb: nothing was measured"
        return f"sparse gradient by {parts}: train.sparse_backend={wanted}{why if wanted == 'auto' else ''}"

    def _make_buckets(self, order: list[str], whole: Collection[str], rows: Collection[str]) -> list[Bucket]:
        """In the order in which a backward completes them: from the last weight to the first."""
        if self.world_size == 1:
            return []  # what is added is ours
        number = {name: place for place, name in enumerate(order)}
        buckets = []
        entries = [name for name in order if name not in whole and name not in rows]
        new_rows, of_whole = ([name for name in order if name in some] for some in (rows, whole))
        # The flat buffers have these one after the other: no bucket has some of both.
        for kind, chosen in ((EntryBucket, entries), (EntryBucket, new_rows), (WholeBucket, of_whole)):
            groups, total = [], self.options.bucket
            for name in reversed(chosen):
                count = sum(self.layout.counts(name))
                if total + count > self.options.bucket:
                    groups.append([])
                    total = 0
                groups[-1].insert(0, name)
                total += count
            buckets += [kind(names, self.layout, self.device) for names in groups]
        return sorted(buckets, key=lambda bucket: -number[bucket.names[0]])

    def _start_backward(self) -> None:
        self.uses: Counter[str] = Counter()
        self.waiting = deque(self.buckets)  # those not sent yet
        self.in_flight: deque[tuple[Bucket, Tensor, Callable[[], Tensor]]] = deque()

    def local_index(self) -> dict[str, Tensor]:
        """Weight -> sorted indices of this rank's entries into its shard."""
        shards = RankShards({name: self.mask.numel(name) for name in self.mask.index})
        return shards.to_local(shards.select(self.mask.index))

    def _make_hook(self, name: str) -> WeightGradHook | None:
        """What an adapted linear calls in its backward; None where the mask has no entry of this weight."""
        index = self.mask.index[name]
        if index.numel() == 0:
            return None
        options, shape = self.options, self.mask.shape[name]
        tiles = Tiles.of_mask(options.granularity, options.block_size, shape, index)
        arguments = (options.backend, index.to(self.device), shape, tiles, options.few_columns)
        how = (options.costs, options.num_tokens)
        if name in self.num_stacked:
            self.backends[name], backend = make_stacked(*arguments, self.num_stacked[name], *how)
        else:
            self.backends[name], backend = make_backend(*arguments, *how)
        self.kernels[name] = backend

        def hook(*factors: Tensor) -> None:
            self.add(name, backend(*factors))

        hook.columns = getattr(backend, "columns", None)  # all that it needs of the input; None: all
        return hook

    def _make_rows_hook(self, name: str, rows: Tensor) -> WeightGradHook:
        """What a weight of which rows are trained calls with its gradient."""
        backend = RowsOfGradient(rows)

        def hook(gradient: Tensor) -> None:
            self.add(name, backend(gradient))

        hook.rows = rows  # all that it needs of the gradient
        return hook

    def _make_whole_hook(self, name: str) -> WeightGradHook:
        """What a weight that is trained whole calls in its backward."""
        return lambda *factors: self.add(name, whole_gradient(*factors))

    def add(self, name: str, values: Tensor) -> None:
        """Add the fp32 gradient of one weight: [k] of its entries in index order, or [numel] of all of it."""
        if self.world_size == 1:
            self.own[self.own_slices[name]] += values
            return
        bucket = self.bucket_of[name]
        self.uses[name] += 1
        if self.options.overlap and self.uses[name] > self.expected[name] and not self.is_profiling:
            raise UserError(
                f"{name} was used {self.uses[name]} times in one forward, {self.expected[name]} times before",
                where="training",
                fix="train.overlap=false: this model's forwards are not all alike",
            )
        if bucket.buffer is None:
            self._allocate(bucket)
        bucket.add(name, values)
        # Always in the one order, which all ranks keep, whatever their backwards do.
        while self.options.overlap and self.waiting:
            if any(self.uses[name] < self.expected[name] for name in self.waiting[0].names):
                break
            self._send(self.waiting.popleft())

    def _allocate(self, bucket: Bucket) -> None:
        bucket.allocate()
        self._count_bytes()

    def _count_bytes(self) -> None:
        filling = [bucket.buffer.nbytes for bucket in self.buckets if bucket.buffer is not None]
        sent = [rows.nbytes for _, rows, _ in self.in_flight]
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, sum(filling) + sum(sent))

    def _send(self, bucket: Bucket) -> None:
        """Start the reduction of a bucket; one that nothing was added to takes part, too."""
        if bucket.buffer is None:
            self._allocate(bucket)
        if len(self.in_flight) == IN_FLIGHT:
            self._receive()
        rows = bucket.rows()
        self.in_flight.append((bucket, rows, collectives.start_reduce_scatter(rows)))
        self._count_bytes()  # while there are both
        bucket.buffer = None  # the rows of whole weights live on in `in_flight`

    def _receive(self) -> None:
        """Wait for the oldest bucket that is under way, and add its sum to what is ours."""
        bucket, _, wait = self.in_flight.popleft()
        bucket.receive(self.own, wait())

    def finish(self) -> None:
        """After a backward: reduce what is left."""
        while self.waiting:
            self._send(self.waiting.popleft())
        if self.is_profiling and self.buckets:
            self._profile_uses()
            for bucket in self.buckets:
                if any(self.expected[name] > 1 for name in bucket.names):
                    self._send(bucket)  # once more: parts may have come when it was on its way
        while self.in_flight:
            self._receive()
        self._start_backward()

    def _profile_uses(self) -> None:
        """How often a backward uses each weight, on the rank that does so most (experts may idle on some)."""
        names = list(self.bucket_of)
        uses = torch.tensor([self.uses[name] for name in names], dtype=torch.int64, device=self.device)
        uses = collectives.all_reduce_max(uses).clamp_(min=1).tolist()
        self.expected, self.is_profiling = dict(zip(names, uses, strict=True)), False

    def clear(self) -> None:
        """Begin anew, in the same memory: `own` is zero."""
        for bucket in self.buckets:
            bucket.buffer = None
        self.own.zero_()
        self._start_backward()
