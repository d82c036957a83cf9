"""Bytes per rank by kind and phase of a run: the arithmetic, with its numbers.

Buffers whose sizes follow from the configuration are exact; activations come from a run on fake tensors,
gathered weights from ZeRO-3's rules; what is estimated says "about".
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from speft_ds.config.recipe import Recipe
from speft_ds.config.train_config import STASH_FORMATS
from speft_ds.sparse.gradient import IN_FLIGHT
from speft_ds.sparse.kernels.backends import expected_backend
from speft_ds.sparse.kernels.costs import KernelCosts
from speft_ds.sparse.kernels.torch_backends import samples_columns
from speft_ds.tools.plan.activations import Pass, PassRun, run_pass
from speft_ds.tools.plan.gathered_weights import PassPeak, pass_peak
from speft_ds.tools.plan.geometry import Geometry

GIB = 2**30
INT32_ELEMENTS = 2**31  # from here on, flat indices are int64
MOMENT_BLOCK = 256  # 8-bit moments that share a scale
# Measured on Linux: Python, torch, DeepSpeed, transformers and gloo, without a model. On a GPU the CUDA
# context and NCCL's buffers: assumed, not measured.
PROCESS = {"cpu": 450 * 2**20, "cuda": 1 * GIB}
if importlib.util.find_spec("triton"):
    PROCESS["cpu"] += 75 * 2**20  # torch loads it where it is installed
# Sets of fp32 scores alive at once.
SCORE_SETS = {"snip": 2, "force": 2, "taylor_fo": 2, "grad_low_magnitude": 2, "synflow": 2, "grasp": 4}
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
        """Entries of the mask, and a classification head."""
        return self.geometry.num_entries + self.geometry.num_head

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
    def persistent(self) -> frozenset[str]:
        """Weights small enough to stay gathered, unless they are trained."""
        small, trained = self.zero_value("param_persistence_threshold"), self.geometry.trained
        return frozenset(n for n, count in self.geometry.numel.items() if count <= small and n not in trained)

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
        return elements.most_common(1)[0][0]

    def zero_value(self, key: str) -> int:
        return int(self.zero.get(f"stage3_{key}", ZERO_DEFAULTS[f"stage3_{key}"]))

    def per_entry(self, kind: str, size: int) -> Line:
        """`size` bytes for each trained entry that a rank owns."""
        formula = f"{self.num_trained:,} entries / {self.world_size} ranks x {size} B"
        return Line(kind, size * self.num_own, formula)

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

    def pass_peak(self, collects: str, rows: int, length: int, stash: str | None = None) -> PassPeak:
        """The peak of one forward and backward; `collects` and `stash` as for `activations.Pass`."""
        return pass_peak(self.run_pass(collects, rows, length, stash).uses, self)

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


def peak_bytes(setup: Setup) -> int:
    """Memory per rank at the peak of the phase that needs most."""
    return max(map(total, phases(setup).values()))


def phases(setup: Setup) -> dict[str, list[Line]]:
    """Memory per rank at the peak of each phase, on the device that computes."""
    train, mask = setup.recipe.train, setup.recipe.mask
    always, state = frozen(setup), trained(setup)
    is_dense = mask.schedule == "drop_grow" and mask.growth == "sft_ag"
    collects = "gradient" if is_dense else "entries"
    step = one_pass(setup, collects, train.micro_batch, setup.recipe.data.max_length, setup.stash)
    update = Line.of("step's temporaries", setup.num_own, 28, "own entries", " (about)")
    found = {"training": [*always, *state, *step], "optimizer step": [*always, *state, update]}
    if not mask.is_scored:
        return found
    again = state if mask.schedule == "periodic" else []
    return {"scoring": [*always, *scoring(setup), *again], **found}


def frozen(setup: Setup) -> list[Line]:
    """What is there all the time, besides what is trained."""
    numel, persistent, b = setup.geometry.numel, setup.persistent, setup.itemsize
    how = "measured" if setup.device == "cpu" else "assumed: CUDA context, NCCL buffers"
    kept, note = (persistent, " (the others are offloaded)") if setup.is_offloaded else (numel, "")
    lines = [
        Line("process", PROCESS[setup.device], f"{how}; the same for any model"),
        setup.shards("base shard", kept, b, note),
    ]
    if setup.world_size > 1 and persistent:
        what = f"weights in tensors of at most {setup.zero_value('param_persistence_threshold'):,}"
        lines.append(Line.of("small weights, gathered", sum(numel[name] for name in persistent), b, what))
    return lines


def trained(setup: Setup) -> list[Line]:
    """The trainable state: what `sparse.SparseState` and the optimizer allocate."""
    mask = setup.recipe.mask
    lines = [
        Line.of("mask", setup.num_trained, setup.index_size, "entries", " (all ranks')"),
        setup.per_entry("gradient", 4),
        *gradient_buckets(setup),
        *gradient_pattern(setup),
        setup.per_entry("index", 0 if setup.is_offloaded else setup.index_size),
        setup.per_entry("base values", setup.itemsize),
        setup.per_entry("delta", 4),
        *optimizer_state(setup),
    ]
    if mask.schedule == "drop_grow":
        size, what = (4, "scores") if mask.growth == "sft_ma" else (8, "gradient and scores")
        lines.append(setup.shards("growth", setup.geometry.targets, size, f" ({what} at a change)"))
    return lines


def optimizer_state(setup: Setup) -> list[Line]:
    """What the optimizer keeps of each entry."""
    optimizer, mask, own = setup.recipe.optimizer, setup.recipe.mask, setup.num_own
    if optimizer.name == "sgd":
        return [setup.per_entry("momentum", 4)] if optimizer.momentum else []
    if optimizer.name == "lion":
        return [setup.per_entry("Lion's average", 4)]
    lines = [setup.per_entry("Adam moments", 8)]
    if optimizer.name != "adamw":
        slots = -(-own // MOMENT_BLOCK) * MOMENT_BLOCK
        formula = f"{own:,} own entries x 2 B + 8 B for {MOMENT_BLOCK} of them, in complete blocks"
        lines = [Line("8-bit Adam moments", 2 * slots + 8 * slots // MOMENT_BLOCK, formula)]
        if mask.schedule in ("periodic", "drop_grow"):
            lines.append(Line.of("slots", slots, 4, "slots", " (from the first change of the mask)"))
    return [*lines, setup.per_entry("entry_steps", 4)] if mask.has_entry_steps else lines


def gradient_buckets(setup: Setup) -> list[Line]:
    """Gradients on their way to their owners: see `gradient.SparseGradient`."""
    train, k = setup.recipe.train, setup.num_trained
    if setup.world_size == 1:
        return []
    bucket = min(k, train.reduce_bucket)
    num_sent = min(IN_FLIGHT, -(-k // bucket))
    filling, what = (bucket, "one bucket") if train.overlap else (k, "all buckets")
    note = f" ({what} as it fills, {num_sent} as they are sent)"
    return [Line.of("gradient buckets", filling + num_sent * bucket, 4, "entries", note)]


def gradient_pattern(setup: Setup) -> list[Line]:
    """What the sparse gradient keeps of the mask in its backend's own layout."""
    k, i = setup.geometry.num_entries, setup.index_size
    columns = 0
    if setup.backend == "columns":
        widths = sum(width for _, width in setup.geometry.targets.values())
        columns = round((setup.recipe.mask.compute or 1.0) * widths)
    confined = sum(setup.geometry.numel[name] for name in setup.geometry.targets) * (
        setup.recipe.mask.compute or 1.0
    )
    if setup.backend == "sampled" or (columns and samples_columns(k, round(confined), setup.device)):
        starts = sum(rows + 1 for rows, _ in setup.geometry.targets.values())
        formula = f"{k:,} entries x ({i} + 4) B + {starts:,} rows x {i} B (CSR)"
        formula += f" + {columns:,} columns x 8 B" if columns else ""
        return [Line("gradient pattern", k * (i + 4) + starts * i + columns * 8, formula)]
    if setup.backend == "columns":
        formula = f"{k:,} entries x {i} B + {columns:,} columns x 8 B"
        return [Line("gradient pattern", k * i + columns * 8, formula)]
    if setup.backend == "element":
        return [Line.of("gradient pattern", k, 13, "entries", " (at most: slots of 5 + 8 B)")]
    return []


def one_pass(setup: Setup, collects: str, rows: int, length: int, stash: str | None = None) -> list[Line]:
    """Activations and gathered weights at the moment when they come to most together."""
    peak, b = setup.pass_peak(collects, rows, length, stash), setup.itemsize
    checkpointing = setup.recipe.train.activation_checkpointing
    formula = f"fake tensors: {rows} rows x {length:,} tokens, checkpointing {checkpointing}"
    formula += f", stash {stash}" if stash else ""
    lines = [Line("activations", peak.activations, formula)]
    if peak.gathered:
        note = " (ZeRO-3's prefetch and reuse)"
        lines.append(Line.of("gathered weights", peak.gathered // b, b, "weights", note))
    return lines


def scoring(setup: Setup) -> list[Line]:
    """What scoring the weights adds."""
    mask, largest, b = setup.recipe.mask, setup.geometry.largest_target, setup.itemsize
    on_host = mask.score_device == "host" and setup.device == "cuda"
    lines = [Line("scores", 0, "in host memory") if on_host else scores(setup)]
    if mask.salience == "lift":
        return [*lines, Line.of("low-rank weight", largest, b + 3 * 8, "weights", " (about; fp64)")]
    if not mask.needs_calibration and mask.salience != "synflow":
        return lines
    rows, length = mask.calibration_batch, setup.recipe.data.max_length
    if mask.salience == "synflow":
        rows, length = 1, 2
    lines += one_pass(setup, "squares" if mask.salience == "fisher" else "gradient", rows, length)
    if setup.world_size > 1 and b < 4 and setup.device == "cpu":
        part = -(-largest // setup.world_size)
        lines.append(Line.of("part of a gradient", part, 4, "weights", " (a rank's part of the largest)"))
    return lines


def scores(setup: Setup) -> Line:
    """The scores themselves, as many sets as the metric needs at once."""
    sets = SCORE_SETS.get(setup.recipe.mask.salience, 1)
    return setup.shards("scores", setup.geometry.targets, 4 * sets, f" (the targets; {sets} x fp32)")


def host(setup: Setup) -> list[Line]:
    """What lies in host memory besides the process, where the device is a GPU."""
    geometry, mask, b = setup.geometry, setup.recipe.mask, setup.itemsize
    lines = []
    if setup.is_offloaded:
        lines.append(setup.shards("offloaded shard", geometry.numel.keys() - setup.persistent, b))
    if mask.is_scored and mask.score_device == "host":
        lines.append(scores(setup))
    note = " (rank 0, while loading; mapped from the file)"
    return [*lines, Line.of("checkpoint", geometry.num_weights, b, "weights", note)]
