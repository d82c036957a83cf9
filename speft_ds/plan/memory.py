"""What one rank holds, by kind and phase of a run: the arithmetic, with its numbers. Imports no torch.

Exact are the buffers whose sizes follow from the configuration; activations and gathered weights are counted
by a dry run; what is estimated says "about".
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from speft_ds.config.recipe import Recipe
from speft_ds.plan.gathers import GatherRules, Peak, simulate
from speft_ds.plan.geometry import Geometry

GIB = 2**30
ITEMSIZE = {"bfloat16": 2, "float32": 4}
INT32_ELEMENTS = 2**31  # from here on, flat indices are int64
MOMENT_BLOCK = 256  # 8-bit moments that share a scale
# Measured on Linux: Python, torch, DeepSpeed, transformers and gloo, without a model. On a GPU the CUDA
# context and NCCL's buffers: assumed, not measured.
PROCESS = {"cpu": 450 * 2**20, "cuda": 1 * GIB}
if importlib.util.find_spec("triton"):
    PROCESS["cpu"] += 75 * 2**20  # torch loads it where it is there
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
    """One kind of memory, traffic or disk space: its size and how it comes about."""

    kind: str
    num_bytes: int
    formula: str


@dataclass(frozen=True)
class Setup:
    """All that the memory of a rank depends on.

    Attributes:
        zero: the `zero_optimization` section of the DeepSpeed configuration.
        device: `cuda` or `cpu`.
    """

    recipe: Recipe
    geometry: Geometry
    zero: dict
    world_size: int
    device: str

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.recipe.model.dtype]

    @property
    def index_size(self) -> int:
        return 4 if self.geometry.largest_target < INT32_ELEMENTS else 8

    @property
    def num_trained(self) -> int:
        """Entries of the mask, and a classification head."""
        return self.geometry.num_entries + self.geometry.num_head

    @property
    def num_own(self) -> int:
        """Trained entries of one rank, if all own equally many."""
        return -(-self.num_trained // self.world_size)

    @property
    def is_offloaded(self) -> bool:
        """Whether the shards are kept in host memory."""
        offload = self.zero.get("offload_param") or {}
        return offload.get("device") == "cpu" and self.device == "cuda"

    @property
    def persistent(self) -> frozenset[str]:
        """Weights small enough to stay whole, unless they are trained."""
        small = self.zero_value("stage3_param_persistence_threshold")
        numel, trained = self.geometry.numel, self.geometry.trained
        return frozenset(name for name, count in numel.items() if count <= small and name not in trained)

    def zero_value(self, key: str) -> int:
        return int(self.zero.get(key, ZERO_DEFAULTS[key]))

    def shards(self, names) -> int:
        """Elements of one rank's shards of these weights, padding included."""
        return sum(-(-self.geometry.numel[name] // self.world_size) for name in names)

    def score_size(self) -> int:
        """Bytes of one set of scores."""
        return 4 * self.shards(self.geometry.targets)

    def rules(self) -> GatherRules:
        return GatherRules(
            prefetch_bucket=self.zero_value("stage3_prefetch_bucket_size"),
            max_live=self.zero_value("stage3_max_live_parameters"),
            reuse_distance=self.zero_value("stage3_max_reuse_distance"),
            persistent=self.persistent,
            targets=self.geometry.trained,
            is_shared=self.world_size > 1 or self.is_offloaded,
            on_cpu=self.device == "cpu",
        )


class DryRuns:
    """Passes counted so far: each is run once, whatever the number of ranks."""

    def __init__(self):
        self.traces, self.peaks = {}, {}

    def peak(self, setup: Setup, collects: str, rows: int, length: int) -> Peak:
        """The peak of one forward and backward; `collects` as for `dry_run.Pass`."""
        from speft_ds.plan.dry_run import Pass, dry_run

        recipe, geometry = setup.recipe, setup.geometry
        train = recipe.train
        one = Pass(
            rows=rows,
            length=length,
            checkpointing=train.activation_checkpointing,
            collects=collects,
            packing=recipe.data.packing,
            walks_all_layers=recipe.walks_all_layers,
            density=geometry.num_entries / geometry.num_target_elements,
            backend=backend_of(setup),
            device=setup.device,
            is_shared=setup.world_size > 1,
        )
        if one not in self.traces:
            config, targets = geometry.config, list(geometry.targets)
            self.traces[one] = dry_run(config, recipe.model.task, recipe.model.dtype, targets, one)
        rules = setup.rules()
        if (one, rules) not in self.peaks:
            self.peaks[one, rules] = simulate(self.traces[one], geometry.numel, setup.itemsize, rules)
        return self.peaks[one, rules]


def phases(setup: Setup, runs: DryRuns) -> dict[str, list[Line]]:
    """What one rank holds at the peak of each phase, on the device that computes."""
    found = {}
    if setup.recipe.mask.is_scored:
        again = setup.recipe.mask.schedule == "periodic"
        found["scoring"] = [*frozen(setup), *scoring(setup, runs), *(state(setup) if again else [])]
    found["training"] = [*frozen(setup), *state(setup), *training(setup, runs)]
    found["optimizer step"] = [*frozen(setup), *state(setup), *step(setup)]
    return found


def total(lines: list[Line]) -> int:
    return sum(line.num_bytes for line in lines)


def frozen(setup: Setup) -> list[Line]:
    """What is there all the time, besides what is trained."""
    geometry, b = setup.geometry, setup.itemsize
    whole = "measured" if setup.device == "cpu" else "assumed: CUDA context, NCCL buffers"
    lines = [Line("process", PROCESS[setup.device], f"{whole}; the same for any model")]
    persistent = sum(geometry.numel[name] for name in setup.persistent)
    on_device = setup.persistent if setup.is_offloaded else geometry.numel
    shards = setup.shards(on_device)
    lines.append(
        Line(
            "base shard",
            shards * b,
            f"{sum(geometry.numel[n] for n in on_device):,} weights / {setup.world_size} ranks x {b} B"
            + (" (the others are offloaded)" if setup.is_offloaded else ""),
        )
    )
    if setup.world_size > 1 and persistent:
        small = setup.zero_value("stage3_param_persistence_threshold")
        formula = f"{persistent:,} weights in tensors of at most {small:,} x {b} B"
        lines.append(Line("small weights, whole", persistent * b, formula))
    return lines


def state(setup: Setup) -> list[Line]:
    """The trainable state: what `sparse.SparseState` and the optimizer allocate."""
    k, own, i, b = setup.num_trained, setup.num_own, setup.index_size, setup.itemsize
    ranks = f"{k:,} entries / {setup.world_size} ranks"
    lines = [
        Line("mask", i * k, f"{k:,} entries x {i} B (all ranks' entries)"),
        Line("gradient", 4 * own, f"{ranks} x 4 B"),
        *buckets(setup),
        *patterns(setup),
        Line("index", 0 if setup.is_offloaded else i * own, f"{ranks} x {i} B"),
        Line("base values", b * own, f"{ranks} x {b} B"),
        Line("delta", 4 * own, f"{ranks} x 4 B"),
        *optimizer_state(setup, ranks),
    ]
    return lines + growth(setup)


def optimizer_state(setup: Setup, ranks: str) -> list[Line]:
    """What the optimizer keeps of each entry; `ranks` says how many there are."""
    recipe, mask, own = setup.recipe.optimizer, setup.recipe.mask, setup.num_own
    if recipe.name == "sgd":
        return [Line("momentum", 4 * own, f"{ranks} x 4 B")] if recipe.momentum else []
    if recipe.name == "lion":
        return [Line("Lion's average", 4 * own, f"{ranks} x 4 B")]
    lines = [Line("Adam moments", 8 * own, f"{ranks} x 8 B")]
    if recipe.name != "adamw":
        slots = -(-own // MOMENT_BLOCK) * MOMENT_BLOCK
        formula = f"{ranks} x 2 B + 8 B for {MOMENT_BLOCK} of them, in whole blocks"
        if recipe.name == "paged_adamw_8bit" and setup.device == "cuda":
            formula += " (on the host where the GPU is full)"
        lines = [Line("8-bit Adam moments", 2 * slots + 8 * slots // MOMENT_BLOCK, formula)]
        if mask.schedule in ("periodic", "drop_grow"):
            lines.append(Line("slots", 4 * slots, f"{ranks} x 4 B (from the first change of the mask)"))
    if mask.has_entry_steps:
        lines.append(Line("entry_steps", 4 * own, f"{ranks} x 4 B"))
    return lines


def buckets(setup: Setup) -> list[Line]:
    """Gradients on their way to their owners: see `gradient.SparseGradient`."""
    from speft_ds.sparse.gradient import IN_FLIGHT

    if setup.world_size == 1:
        return []
    train, k = setup.recipe.train, setup.num_trained
    if not train.overlap or k <= (IN_FLIGHT + 1) * train.reduce_bucket:
        return [Line("gradient buckets", 4 * k, f"{k:,} entries x 4 B (all ranks' entries)")]
    count = (IN_FLIGHT + 1) * train.reduce_bucket
    formula = f"at most {IN_FLIGHT + 1} buckets of {train.reduce_bucket:,} entries x 4 B"
    return [Line("gradient buckets", 4 * count, formula)]


def patterns(setup: Setup) -> list[Line]:
    """What the sparse gradient keeps of the mask in its backend's own layout."""
    k, i = setup.geometry.num_entries, setup.index_size
    starts = sum(rows + 1 for rows, _ in setup.geometry.targets.values())
    backend = backend_of(setup)
    if backend == "sampled":
        formula = f"{k:,} entries x ({i} + 4) B + {starts:,} rows x {i} B (CSR)"
        return [Line("gradient pattern", k * (i + 4) + starts * i, formula)]
    if backend == "element":
        return [Line("gradient pattern", 13 * k, f"at most {k:,} entries x (5 + 8) B (slots)")]
    return []


def backend_of(setup: Setup) -> str:
    """The sparse gradient's backend, as it should be chosen."""
    import torch  # only names a device here

    from speft_ds.sparse.kernels.backends import expected_backend

    density = setup.geometry.num_entries / setup.geometry.num_target_elements
    recipe = setup.recipe
    device = torch.device(setup.device)
    mask = recipe.mask
    return expected_backend(recipe.train.sparse_backend, density, device, mask.granularity, mask.block_size)


def growth(setup: Setup) -> list[Line]:
    """What `drop_grow` looks for new entries with, at most at a change of the mask."""
    mask, size = setup.recipe.mask, setup.score_size()
    if mask.schedule != "drop_grow":
        return []
    elements = f"{setup.geometry.num_target_elements:,} targeted weights / {setup.world_size} ranks"
    if mask.growth == "sft_ma":
        return [Line("growth", size, f"{elements} x 4 B (scores at a change)")]
    return [Line("growth", 2 * size, f"{elements} x 8 B (gradient and scores at a change)")]


def training(setup: Setup, runs: DryRuns) -> list[Line]:
    """What the forward and backward of a micro-batch add."""
    recipe = setup.recipe
    rows, length = recipe.train.micro_batch, recipe.data.max_length
    collects = (
        "gradient" if recipe.mask.schedule == "drop_grow" and recipe.mask.growth == "sft_ag" else "entries"
    )
    return passing(setup, runs.peak(setup, collects, rows, length), rows, length)


def passing(setup: Setup, peak: Peak, rows: int, length: int) -> list[Line]:
    """Activations and gathered weights at the moment when they come to most together."""
    checkpointing = setup.recipe.train.activation_checkpointing
    formula = f"dry run: {rows} rows x {length:,} tokens, checkpointing {checkpointing}"
    lines = [Line("activations", peak.activations, formula)]
    if peak.gathered:
        count = peak.gathered // setup.itemsize
        formula = f"dry run: {count:,} weights x {setup.itemsize} B (ZeRO-3's prefetch and reuse)"
        lines.append(Line("gathered weights", peak.gathered, formula))
    return lines


def scoring(setup: Setup, runs: DryRuns) -> list[Line]:
    """What scoring the weights adds."""
    recipe, geometry = setup.recipe, setup.geometry
    mask, on_host = recipe.mask, recipe.mask.score_device == "host" and setup.device == "cuda"
    sets = SCORE_SETS.get(mask.salience, 1)
    elements = f"{geometry.num_target_elements:,} targeted weights / {setup.world_size} ranks"
    scores = 0 if on_host else sets * setup.score_size()
    where = " (in host memory)" if on_host else ""
    lines = [Line("scores", scores, f"{elements} x 4 B x {sets}{where}")]
    largest = geometry.largest_target
    if mask.salience == "lift":
        size = setup.itemsize + 3 * 8
        lines.append(Line("low-rank weight", largest * size, f"about {largest:,} weights x {size} B (fp64)"))
    elif mask.needs_calibration or mask.salience == "synflow":
        rows, length = (
            (1, 2) if mask.salience == "synflow" else (mask.calibration_batch, recipe.data.max_length)
        )
        collects = "squares" if mask.salience == "fisher" else "gradient"
        lines += passing(setup, runs.peak(setup, collects, rows, length), rows, length)
        if setup.world_size > 1 and setup.itemsize < 4 and setup.device == "cpu":
            part = -(-largest // setup.world_size)
            lines.append(Line("part of a gradient", 4 * part, f"{largest:,} weights / ranks x 4 B"))
    return lines


def step(setup: Setup) -> list[Line]:
    """What the reduction and the optimizer step add, when the activations are gone."""
    own = setup.num_own
    return [Line("step's temporaries", 28 * own, f"about {own:,} own entries x 28 B")]


def host(setup: Setup) -> list[Line]:
    """What lies in host memory besides the process, where the device is a GPU."""
    geometry, b = setup.geometry, setup.itemsize
    lines = []
    if setup.is_offloaded:
        names = [name for name in geometry.numel if name not in setup.persistent]
        formula = f"{sum(geometry.numel[n] for n in names):,} weights / {setup.world_size} ranks x {b} B"
        lines.append(Line("offloaded shard", setup.shards(names) * b, formula))
    if setup.recipe.mask.is_scored and setup.recipe.mask.score_device == "host":
        sets = SCORE_SETS.get(setup.recipe.mask.salience, 1)
        formula = (
            f"{geometry.num_target_elements:,} targeted weights / {setup.world_size} ranks x 4 B x {sets}"
        )
        lines.append(Line("scores", sets * setup.score_size(), formula))
    formula = f"{geometry.num_weights:,} weights x {b} B (rank 0, while loading; mapped from the file)"
    return [*lines, Line("checkpoint", geometry.num_weights * b, formula)]
