"""What a plan is made for: a recipe, a model's geometry, ranks and their device; and lines of arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from speft_ds.config.recipe import Recipe
from speft_ds.config.train_config import STASH_FORMATS
from speft_ds.model.codecs import codec
from speft_ds.model.targets import layer_number
from speft_ds.sparse.kernels.backends import expected_backend
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.tools.plan.activations import Pass, PassRun, run_pass
from speft_ds.tools.plan.gathered_weights import PassPeak, pass_peak
from speft_ds.tools.plan.geometry import Geometry
from speft_ds.tools.plan.stored_weights import Parameter, Storage, added_up, count_elements

GIB = 2**30
INT32_ELEMENTS = 2**31  # from here on, flat indices are int64
# DeepSpeed's own defaults.
ZERO_DEFAULTS = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class Line:
    """One kind of memory, traffic or disk space: its size and its arithmetic."""

    kind: str
    num_bytes: int
    formula: str

    @classmethod
    def of(cls, kind: str, count: int, size: int, what: str, note: str = "") -> Line:
        """`count` times `size` bytes; `what` is counted: `weights`."""
        return cls(kind, count * size, f"{count:,} {what} x {size} B{note}")


def total(lines: list[Line]) -> int:
    return sum(line.num_bytes for line in lines)


@dataclass(frozen=True)
class Setup:
    """All that the memory per rank depends on."""

    recipe: Recipe
    geometry: Geometry
    zero: dict  # the `zero_optimization` section of the DeepSpeed configuration
    world_size: int
    device: str  # `cuda` or `cpu`
    costs: KernelCosts | None = None  # that backends are chosen by; None: rules of thumb

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.geometry.dtype).itemsize

    @property
    def index_size(self) -> int:
        return 4 if self.geometry.largest_target < INT32_ELEMENTS else 8

    @property
    def num_trained(self) -> int:
        """Entries of the mask, and elements of whole weights, as many as are trained at a time."""
        return self.geometry.num_entries + self.num_whole

    @property
    def num_whole(self) -> int:
        """Elements of the weights that are trained whole at a time."""
        numel, method = self.geometry.numel, self.recipe.method
        by_layer: Counter[int | None] = Counter()
        for name in self.geometry.whole:
            by_layer[layer_number(name)] += numel[name]
        if method.name == "half":
            return -(-by_layer.total() // 2)
        if method.name != "lisa":
            return by_layer.total()
        outside = by_layer.pop(None, 0)
        return outside + sum(sorted(by_layer.values())[-method.layers :])

    @property
    def num_own(self) -> int:
        """Trained entries per rank, if all own equally many."""
        return -(-self.num_trained // self.world_size)

    @property
    def is_offloaded(self) -> bool:
        """Whether the shards are kept in host memory."""
        return (self.zero.get("offload_param") or {}).get("device") == "cpu" and self.device == "cuda"

    @property
    def is_partitioned(self) -> bool:
        """Whether weights are gathered and freed, as they are unless a single rank keeps them."""
        keeps = self.recipe.deepspeed.keep_unpartitioned and not self.is_offloaded
        return self.world_size > 1 or not keeps

    @property
    def in_few_bits(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the weights in `model.base_format`."""
        return self.storage().in_few_bits

    def storage(self, has_values: bool = True, is_dense: bool = False) -> Storage:
        """How the weights are stored; arguments as for `Storage`."""
        base_format = self.recipe.model.base_format
        coder = None if base_format is None else codec(base_format)
        return Storage(self.geometry, self.itemsize, self.world_size, coder, has_values, is_dense)

    def is_persistent(self, parameter: Parameter) -> bool:
        """Whether it is small enough to stay gathered, and is not written to."""
        return parameter.may_persist and parameter.numel <= self.zero_value("param_persistence_threshold")

    @property
    def backend(self) -> str:
        """The sparse gradient's backend, as it should be chosen for most of the targeted elements."""
        mask, train, geometry = self.recipe.mask, self.recipe.train, self.geometry
        device, num_tokens = torch.device(self.device), train.micro_batch * self.recipe.data.max_length
        how = (train.sparse_backend, geometry.density, device, mask.granularity, mask.block_size)
        elements: Counter[str] = Counter()
        shapes = Counter(geometry.targets.values())
        for shape, count in shapes.items():
            name = expected_backend(*how, mask.compute, self.costs, shape, num_tokens)
            elements[name] += count * shape[0] * shape[1]
        return elements.most_common(1)[0][0] if elements else "dense"

    def zero_value(self, key: str) -> int:
        return int(self.zero.get(f"stage3_{key}", ZERO_DEFAULTS[f"stage3_{key}"]))

    def per_entry(self, kind: str, size: int, of_mask: bool = False) -> Line:
        """`size` bytes for each trained entry that a rank owns; `of_mask`: whole weights left out."""
        count = self.geometry.num_entries if of_mask else self.num_trained
        formula = f"{count:,} entries / {self.world_size} ranks x {size} B"
        return Line(kind, size * -(-count // self.world_size), formula)

    def stored(self, kind: str, parameters: Iterable[Parameter], note: str = "") -> Line:
        """A rank's shards of these parameters, padding included."""
        counts = count_elements(parameters := list(parameters))
        formula = f"({added_up(counts)})" if len(counts) > 1 else added_up(counts) or "none"
        formula = f"{formula} / {self.world_size} ranks{note}"
        return Line(kind, sum(one.shard_bytes(self.world_size) for one in parameters), formula)

    def shards(self, kind: str, names: Iterable[str], size: int, note: str = "") -> Line:
        """`size` bytes for each element of a rank's shards of these weights, padding included."""
        numel = [self.geometry.numel[name] for name in names]
        formula = f"{sum(numel):,} weights / {self.world_size} ranks x {size} B{note}"
        return Line(kind, size * sum(-(-count // self.world_size) for count in numel), formula)

    @property
    def stash(self) -> str | None:
        """The format of stashed activations: of a dynamic stash, the one with most bits."""
        asked = self.recipe.train.stash
        return STASH_FORMATS[-1] if asked == "dynamic" else asked

    def pass_peak(
        self,
        collects: str,
        rows: int,
        length: int,
        stash: str | None = None,
        storage: Storage | None = None,
    ) -> PassPeak:
        """The peak of one forward and backward; `collects` and `stash` as for `activations.Pass`.

        Args:
            storage: None: as in training.
        """
        uses = self.run_pass(collects, rows, length, stash).uses
        return pass_peak(uses, self, storage or self.storage())

    def run_pass(self, collects: str, rows: int, length: int, stash: str | None = None) -> PassRun:
        """One forward and backward; arguments as for `pass_peak`."""
        recipe = self.recipe
        one = Pass(
            rows=rows,
            length=length,
            collects=collects,
            checkpointing=recipe.train.activation_checkpointing,
            packing=recipe.data.packing,
            walks_all_layers=recipe.walks_all_layers,
            backend=self.backend,
            device=self.device,
            is_partitioned=self.is_partitioned,
            compute=recipe.mask.compute or 1.0,
            stash=stash,
        )
        return run_pass(self.geometry, one)
