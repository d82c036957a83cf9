"""Bytes per rank by kind and phase of a run: the arithmetic, with its numbers.

Buffers whose sizes follow from the configuration are exact; activations come from a run on fake tensors,
gathered weights from ZeRO-3's rules; what is estimated says "about".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from speft_ds.config.mask_config import CHANGE_WEIGHTS
from speft_ds.sparse.gradient import IN_FLIGHT
from speft_ds.sparse.kernels.torch_backends import samples_columns
from speft_ds.sparse.optim.optimizers import STEP_ELEMENTS
from speft_ds.tools.plan.setup import GIB, Line, Setup, total
from speft_ds.tools.plan.stored_weights import (
    CODES,
    SCALES,
    VALUES,
    WEIGHTS,
    Storage,
    added_up,
    count_elements,
    num_bytes,
)

MOMENT_BLOCK = 256  # 8-bit moments that share a scale
# Measured on Linux: Python, torch, DeepSpeed, transformers and gloo, without a model. On a GPU the CUDA
# context and NCCL's buffers: assumed, not measured.
PROCESS = {"cpu": 450 * 2**20, "cuda": 1 * GIB}
if importlib.util.find_spec("triton"):
    PROCESS["cpu"] += 75 * 2**20  # torch loads it where it is installed
# Sets of fp32 scores alive at once.
SCORE_SETS = {"snip": 2, "force": 2, "taylor_fo": 2, "grad_low_magnitude": 2, "synflow": 2, "grasp": 4}


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
    at_once = setup.num_own - setup.num_whole // setup.world_size
    at_once += min(setup.num_whole // setup.world_size, STEP_ELEMENTS[setup.device])
    update = Line.of("step's temporaries", at_once, 28, "own entries", " (about)")
    state += original(setup) if mask.schedule == "periodic" else []
    found = {"training": [*always, *state, *step], "optimizer step": [*always, *state, update]}
    if mask.is_scored and setup.recipe.method.has_mask:
        again = state if mask.schedule == "periodic" else original(setup)
        found = {"scoring": [*always, *scoring(setup), *again], **found}
    if setup.in_few_bits and setup.device == "cpu":  # else it is in host memory while it loads
        found = {"loading": loading(setup), **found}
    return found


def loading(setup: Setup) -> list[Line]:
    """While a base is put into few bits, a weight at a time: it was loaded as it is."""
    largest = max(rows * columns for rows, columns in setup.in_few_bits.values())
    lines = [
        process(setup),
        base_in_dtype(setup, "base, loaded"),
        Line.of("gathered weight", largest, setup.itemsize, "weights"),
    ]
    return lines + (coded(setup) if setup.recipe.mask.needs_original else [])


def process(setup: Setup) -> Line:
    """What a process has without a model."""
    how = "measured" if setup.device == "cpu" else "assumed: CUDA context, NCCL buffers"
    return Line("process", PROCESS[setup.device], f"{how}; the same for any model")


def base_in_dtype(setup: Setup, kind: str, names: Iterable[str] | None = None, note: str = "") -> Line:
    """A rank's part of these weights as the checkpoint has them; None: of all."""
    return setup.shards(kind, setup.geometry.numel if names is None else names, setup.itemsize, note)


def frozen(setup: Setup) -> list[Line]:
    """What is there all the time, besides what is trained."""
    base = setup.storage(has_values=False).parameters().values()
    persistent = [one for one in base if setup.is_persistent(one)]
    plain = [one for one in (persistent if setup.is_offloaded else base) if one.kind == WEIGHTS]
    note = " (the others are offloaded)" if setup.is_offloaded else ""
    lines = [process(setup), setup.stored("base shard", plain, note), *coded(setup)]
    if setup.world_size > 1 and persistent:
        counts, limit = count_elements(persistent), setup.zero_value("param_persistence_threshold")
        formula = f"{added_up(counts)}, in tensors of at most {limit:,}"
        lines.append(Line("small weights, gathered", num_bytes(counts), formula))
    return lines


def original(setup: Setup) -> list[Line]:
    """A rank's part of what is in few bits as it was: until training begins, or while masks change."""
    if not setup.recipe.mask.needs_original or setup.device == "cuda":  # there it is in host memory
        return []
    return [base_in_dtype(setup, "original weights", setup.in_few_bits)]


def coded(setup: Setup) -> list[Line]:
    """A rank's part of the codes and scales, where the base is in few bits, on the device that computes."""
    storage = setup.storage(has_values=False)
    if not storage.in_few_bits:
        return []
    base = storage.parameters().values()
    kept = [one for one in base if not setup.is_offloaded or setup.is_persistent(one)]
    numel = sum(rows * columns for rows, columns in storage.in_few_bits.values())
    what = f" ({numel:,} weights of {storage.codec.bits} bits)"
    blocks = f" (one for {storage.codec.block} weights)"
    return [
        setup.stored("codes", [one for one in kept if one.kind == CODES], what),
        setup.stored("scales", [one for one in kept if one.kind == SCALES], blocks),
    ]


def trained(setup: Setup) -> list[Line]:
    """The trainable state: what `sparse.SparseState` and the optimizer allocate."""
    mask = setup.recipe.mask
    lines = [
        Line.of("mask", setup.geometry.num_entries, setup.index_size, "entries", " (all ranks')"),
        setup.per_entry("gradient", 4),
        *gradient_buckets(setup),
        *gradient_pattern(setup),
        setup.per_entry("index", 0 if setup.is_offloaded else setup.index_size, of_mask=True),
        setup.per_entry("base values", setup.itemsize, of_mask=True),
        setup.per_entry("delta", 4),
        *values_in_place(setup),
        *optimizer_state(setup),
    ]
    if mask.schedule == "drop_grow":
        size, what = (4, "scores") if mask.growth == "sft_ma" else (8, "gradient and scores")
        lines.append(setup.shards("growth", setup.geometry.targets, size, f" ({what} at a change)"))
    return lines


def values_in_place(setup: Setup) -> list[Line]:
    """The values of the entries beside weights in few bits, and their places among these."""
    values = [one for one in setup.storage().parameters().values() if one.kind == VALUES]
    if not values or setup.is_offloaded:
        return []
    entries = sum(setup.geometry.entries.get(name, 0) for name in setup.in_few_bits)
    size = setup.index_size
    formula = f"{entries:,} entries / {setup.world_size} ranks x {size} B"
    places = Line("places of values", -(-entries // setup.world_size) * size, formula)
    return [setup.stored("values", values), places]


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
    return [*lines, setup.per_entry("entry_steps", 4)] if setup.recipe.has_entry_steps else lines


def gradient_buckets(setup: Setup) -> list[Line]:
    """Gradients on their way to their owners: see `gradient.SparseGradient`."""
    train, k = setup.recipe.train, setup.num_trained
    if setup.world_size == 1:
        return []
    largest = max((setup.geometry.numel[name] for name in setup.geometry.whole), default=0)
    bucket = min(k, max(train.reduce_bucket, largest))  # a whole weight is reduced at once
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


def one_pass(
    setup: Setup,
    collects: str,
    rows: int,
    length: int,
    stash: str | None = None,
    storage: Storage | None = None,
) -> list[Line]:
    """Activations and gathered weights at the moment when they come to most together."""
    peak = setup.pass_peak(collects, rows, length, stash, storage)
    checkpointing = setup.recipe.train.activation_checkpointing
    formula = f"fake tensors: {rows} rows x {length:,} tokens, checkpointing {checkpointing}"
    formula += f", stash {stash}" if stash else ""
    lines = [Line("activations", peak.activations, formula)]
    if peak.gathered:
        formula = f"{added_up(peak.gathered)} (ZeRO-3's prefetch and reuse)"
        lines.append(Line("gathered weights", num_bytes(peak.gathered), formula))
    if peak.decoded:
        formula = f"one, while its module computes, in {setup.geometry.dtype}, and what decoding it takes"
        lines.append(Line("decoded weight", peak.decoded, formula))
    return lines


def scoring(setup: Setup) -> list[Line]:
    """What scoring the weights adds."""
    mask, largest, b = setup.recipe.mask, setup.geometry.largest_target, setup.itemsize
    on_host = mask.score_device == "host" and setup.device == "cuda"
    lines = [Line("scores", 0, "in host memory") if on_host else scores(setup)]
    storage = setup.storage(mask.schedule == "periodic", mask.salience in CHANGE_WEIGHTS)
    if storage.in_few_bits and storage.is_dense and not setup.is_offloaded:
        note = f" ({mask.salience} changes every weight)"
        lines.append(base_in_dtype(setup, "complete weights", storage.in_few_bits, note))
    if mask.salience == "lift":
        return [*lines, Line.of("low-rank weight", largest, b + 3 * 8, "weights", " (about; fp64)")]
    if not mask.needs_calibration and mask.salience != "synflow":
        return lines + live_weight(setup)
    rows, length = mask.calibration_batch, setup.recipe.data.max_length
    if mask.salience == "synflow":
        rows, length = 1, 2
    collects = "squares" if mask.salience == "fisher" else "gradient"
    lines += one_pass(setup, collects, rows, length, storage=storage)
    if setup.world_size > 1 and b < 4 and setup.device == "cpu":
        part = -(-largest // setup.world_size)
        lines.append(Line.of("part of a gradient", part, 4, "weights", " (a rank's part of the largest)"))
    return lines


def live_weight(setup: Setup) -> list[Line]:
    """A weight in few bits that is decoded to be scored, and a copy of it."""
    if not setup.in_few_bits or setup.recipe.mask.salience == "random":
        return []
    largest = max(rows * columns for rows, columns in setup.in_few_bits.values())
    return [Line.of("decoded weight", 2 * largest, setup.itemsize, "weights", " (one, and its copy)")]


def scores(setup: Setup) -> Line:
    """The scores themselves, as many sets as the metric needs at once."""
    sets = SCORE_SETS.get(setup.recipe.mask.salience, 1)
    return setup.shards("scores", setup.geometry.targets, 4 * sets, f" (the targets; {sets} x fp32)")


def host(setup: Setup) -> list[Line]:
    """What lies in host memory besides the process, where the device is a GPU."""
    geometry, mask, b = setup.geometry, setup.recipe.mask, setup.itemsize
    lines = []
    if setup.is_offloaded:
        stored = setup.storage().parameters().values()
        lines.append(setup.stored("offloaded shard", [p for p in stored if not setup.is_persistent(p)]))
    if setup.in_few_bits and mask.needs_original:
        note = " (from loading on, for mask.start=exact or mask.salience=quant_error)"
        lines.append(base_in_dtype(setup, "original weights", note=note))
    elif setup.in_few_bits:
        lines.append(base_in_dtype(setup, "base, while loading", note=" (freed weight by weight)"))
    if mask.is_scored and setup.recipe.method.has_mask and mask.score_device == "host":
        lines.append(scores(setup))
    note = " (rank 0, while loading; mapped from the file)"
    return [*lines, Line.of("checkpoint", geometry.num_weights, b, "weights", note)]
