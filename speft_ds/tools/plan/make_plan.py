"""The plan of a run, from its recipe and the model's configuration: no weights, no GPU.

Whether it fits, and what to change if not; memory per rank by kind and phase, traffic, steps, files, with the
arithmetic of every line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset_cache import DatasetSpec, find_cached
from speft_ds.data.sampler import Sampler
from speft_ds.data.sources import iterate_rows
from speft_ds.errors import UserError
from speft_ds.model.dtype import bfloat16_cost, multiplies_bfloat16, resolve_dtype
from speft_ds.model.targets import shorten
from speft_ds.tools.doctor import usable_memory
from speft_ds.tools.plan.arithmetic import Arithmetic, count_arithmetic, known_costs
from speft_ds.tools.plan.geometry import read_geometry
from speft_ds.tools.plan.memory_model import host, peak_bytes, phases
from speft_ds.tools.plan.setup import GIB, Line, Setup, total
from speft_ds.tools.plan.stored_weights import added_up, num_bytes
from speft_ds.training.checkpoint.folder import checkpoint_entry

MARGIN = 0.1  # of the GPU, left to the allocator: what it holds beyond what is asked for
MAX_RANKS = 4096
GPU_GIB = 80.0  # of a GPU, where nothing else is said


@dataclass(frozen=True)
class Plan:
    """What each rank will need, and the complete run."""

    setup: Setup
    gpu_gib: float  # memory of each GPU, or of each rank on a CPU
    memory: dict[str, list[Line]]  # phase -> memory per rank at its peak
    host: list[Line]  # what lies in host memory besides
    traffic: list[Line]  # what a rank receives per optimizer step
    steps: dict[str, tuple[int | None, str]]  # name -> value, or None if unknown, and its arithmetic
    files: list[Line]  # what the run leaves on disk
    notes: list[str]
    arithmetic: Arithmetic  # of a micro-batch: what the mask's weight gradient costs beside the model
    smallest_world_size: int | None = None  # that fits with this recipe; None: no number does
    suggestions: dict[str, int] = field(default_factory=dict)  # what to change, best first -> the peak then

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.memory, key=lambda phase: total(self.memory[phase]))

    @property
    def num_bytes(self) -> int:
        """Peak per rank over all phases."""
        return total(self.memory[self.peak_phase])

    @property
    def limit(self) -> int:
        """What may be planned with, margin left out."""
        return int(self.gpu_gib * (1 - MARGIN) * GIB)

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.limit


def make_plan(
    recipe: Recipe,
    world_size: int,
    gpu_gib: float | None = None,
    num_rows: int | None = None,
    device: str = "cuda",
) -> Plan:
    """The plan of a training run.

    Args:
        world_size: ranks, each with a GPU of `gpu_gib`; None: GPU_GIB, or on a CPU its share of what is free.
        num_rows: rows of the training data; None: those of the recipe's file, if it is on this machine.
        device: `cpu` plans for ranks on a CPU, whose memory includes that of the process.
    Raises:
        UserError: no configuration of the model is cached, or it does not go with the recipe.
        RecipeError: the batch cannot be shared among so many ranks, or the DeepSpeed configuration is wrong.
    """
    is_auto = recipe.model.dtype == "auto"
    recipe = resolve_dtype(recipe, device == "cuda" or multiplies_bfloat16("cpu"))
    zero = load_ds_config(recipe, world_size)["zero_optimization"]
    costs = known_costs(recipe, device, world_size)
    setup = Setup(recipe, read_geometry(recipe), zero, world_size, device, costs)
    if gpu_gib is None:
        gpu_gib = GPU_GIB if device == "cuda" else usable_memory() / world_size / GIB
    plan = Plan(
        setup,
        gpu_gib,
        memory=phases(setup),
        host=host(setup) if device == "cuda" else [],
        traffic=traffic(setup),
        steps=steps(recipe, world_size, num_rows),
        files=files(setup),
        notes=notes(setup, is_auto),
        arithmetic=count_arithmetic(setup),
    )
    smallest = smallest_world_size(setup, plan.limit)
    suggestions = {} if plan.fits else suggest(setup, plan.limit, smallest)
    return replace(plan, smallest_world_size=smallest, suggestions=suggestions)


def traffic(setup: Setup) -> list[Line]:
    """What a rank receives per optimizer step."""
    train, ranks = setup.recipe.train, setup.world_size
    if ranks == 1:
        return [Line("weights and gradient", 0, "a single rank has all of them")]
    rounds = train.global_batch // (train.micro_batch * ranks)

    def line(kind: str, counts: Counter) -> Line:
        each = f"({added_up(counts)})" if len(counts) > 1 else added_up(counts)
        formula = f"{each} x {ranks - 1}/{ranks} x {rounds} micro-batches"
        return Line(kind, num_bytes(counts) * (ranks - 1) // ranks * rounds, formula)

    gathered = setup.pass_peak("entries", train.micro_batch, setup.recipe.data.max_length).traffic
    weights = [line(f"weights, {kind}", counts) for kind, counts in gathered.items() if counts]
    return [*weights, line("gradient", Counter({("entries", 4): setup.num_trained}))]


def steps(recipe: Recipe, world_size: int, num_rows: int | None) -> dict[str, tuple[int | None, str]]:
    """Sequences per epoch, steps and tokens, with what they follow from; None where that is not known."""
    train, length = recipe.train, recipe.data.max_length
    order, why = (Sampler((num_rows,), None, 0), "--rows") if num_rows else find_order(recipe)
    batch = f"{train.global_batch} sequences per step"
    accumulation = train.global_batch // (train.micro_batch * world_size)
    if train.steps is not None:
        number, how = train.steps, "train.steps"
    elif order is None:
        number, how = None, "not known without the number of rows: --rows N, or train.steps=N"
    else:
        number = order.num_steps(train.global_batch, None, train.epochs)
        how = f"{len(order):,} sequences x {train.epochs:g} epochs / {batch}"
    per_step = train.global_batch * length
    tokens, at_most = (None, "") if number is None else (number * per_step, f"at most: {number:,} ")
    return {
        "sequences per epoch": (len(order) if order else None, why),
        "accumulation": (accumulation, f"{batch} / ({train.micro_batch} x {world_size} ranks)"),
        "tokens per step": (per_step, f"at most: {batch} x {length:,}"),
        "steps": (number, how),
        "tokens": (tokens, f"{at_most}steps x tokens per step"),
    }


def find_order(recipe: Recipe) -> tuple[Sampler | None, str]:
    """The order of the rows that are on this machine, and how they were counted; None where they are not."""
    data = recipe.data
    try:
        if corpus := find_cached(DatasetSpec.from_recipe(recipe).path()):
            kind = "packs" if corpus.is_packed else "rows"
            return corpus.order(data.weights, recipe.seed), f"tokenised before: {kind}"
        sizes = [sum(1 for _ in iterate_rows(source)) for source in data.sources]
    except UserError as error:
        return None, f"{error.what}: --rows N"
    paths = ", ".join(source.path for source in data.sources)
    weights, why = data.weights, f"rows as they are in {paths}"
    if data.select != "all":
        sizes, weights = [min(data.select_rows, sum(sizes))], None
        why = f"data.select_rows of the rows in {paths}"
    why += ", before packing: speft data tells exactly" if data.packing else ""
    return Sampler(tuple(sizes), weights, recipe.seed), why


def files(setup: Setup) -> list[Line]:
    """What the run writes."""
    k, each, recipe = setup.geometry.num_entries, checkpoint_entry(setup.recipe), setup.recipe
    whole = sum(setup.geometry.numel[name] for name in setup.geometry.whole)
    header = 2 * sum(len(name) + 70 for name in setup.geometry.targets)
    formula = f"{k:,} entries x about 6 B (delta 4, coded index 1 to 3) + names"
    if recipe.mask.schedule == "periodic":
        formula += "; more with every change of the mask"
    size = 6 * k + header + whole * setup.itemsize
    if whole:
        formula += f", {whole:,} elements of whole weights x {setup.itemsize} B"
    num_trained, closed = setup.num_trained, whole - setup.num_whole
    checkpoint = f"about {num_trained:,} entries x {each} B ({recipe.optimizer.name})"
    checkpoint += f" + {closed:,} x {setup.itemsize} B of weights that are closed" if closed else ""
    disk = each * num_trained + closed * setup.itemsize
    return [Line("adapter", size, formula), Line("a checkpoint", disk, checkpoint)]


def notes(setup: Setup, is_auto: bool) -> list[str]:
    """What the numbers leave out or take for granted; `is_auto`: the dtype was left to the hardware."""
    recipe = setup.recipe
    found = ["every row is taken to be as long as data.max_length; entries to be spread evenly over ranks"]
    if is_auto:
        whose = "a GPU that multiplies bfloat16" if setup.device == "cuda" else "the CPU of this machine"
        found.append(f"model.dtype=auto is planned as {recipe.model.dtype}, for {whose}")
    if setup.device == "cpu" and (is_auto or recipe.model.dtype == "bfloat16"):
        cost = bfloat16_cost()
        advice = ": set model.dtype=float32" if cost > 1 and recipe.model.dtype == "bfloat16" else ""
        found.append(f"a product in bfloat16 takes {cost:.2g} times as long here as in float32{advice}")
    if few := setup.in_few_bits:
        numel = sum(rows * columns for rows, columns in few.values())
        text = f"{len(few)} weights, {numel / setup.geometry.num_weights:.1%} of the model's elements, in "
        text += f"{recipe.model.base_format}, {setup.storage().codec.bits_per_weight:.2f} bits each; all "
        found.append(text + f"others in {recipe.model.dtype}")
    if setup.geometry.whole:
        names = shorten(list(setup.geometry.whole))
        found.append(f"trained whole: {setup.num_whole:,} elements at a time: {names}")
    if recipe.method.has_lora:
        found.append("of the activations of low-rank matrices, those between A and B are not counted")
    if recipe.mask.schedule == "periodic":
        found.append("entries that leave a periodic mask stay in memory, about 14 bytes each: not counted")
    if recipe.eval.tasks:
        found.append("evaluation is not counted: eval.batch_size is its own to choose")
    if setup.device == "cpu":
        found.append("glibc keeps freed memory, half as much again: MALLOC_MMAP_THRESHOLD_=65536 avoids it")
    return found


# What would fit


def smallest_world_size(setup: Setup, limit: int) -> int | None:
    """The fewest ranks that fit and share the global batch; None where no number does."""
    train = setup.recipe.train
    micro_batches = train.global_batch // train.micro_batch
    for ranks in range(1, min(micro_batches, MAX_RANKS) + 1):
        if micro_batches % ranks == 0 and peak_bytes(replace(setup, world_size=ranks)) <= limit:
            return ranks
    return None


def suggest(setup: Setup, limit: int, smallest: int | None) -> dict[str, int]:
    """Changes that help -> the peak after each, best first; then, if none is enough, several together.

    Args:
        limit: bytes there are; smallest: the smallest world size.
    """
    needed = best = peak_bytes(setup)
    helpful = []
    for text, change in _changes(setup, smallest):
        size = peak_bytes(change(setup))
        if size < 0.99 * needed:
            helpful.append((size, text, change))
    helpful.sort(key=lambda one: one[0])
    found = {text: size for size, text, _ in helpful}
    if not helpful or helpful[0][0] <= limit:
        return found
    together, texts = setup, []
    for _, text, change in helpful:
        size = peak_bytes(change(together))
        if size < best:
            together, best = change(together), size
            texts.append(text)
        if best <= limit:
            break
    return found | {" ".join(texts): best}


def _changes(setup: Setup, smallest: int | None) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """Everything that could take less memory with this recipe: what to type, and how it changes a setup."""
    train, data, mask, ranks = setup.recipe.train, setup.recipe.data, setup.recipe.mask, setup.world_size
    if smallest is not None and smallest > ranks:
        yield f"--world {smallest}", partial(replace, world_size=smallest)
    elif train.global_batch // train.micro_batch % (2 * ranks) == 0:
        yield f"--world {2 * ranks}", partial(replace, world_size=2 * ranks)
    one_row = {"train.micro_batch": 1} if train.micro_batch > 1 else {}
    if setup.recipe.needs_calibration and mask.calibration_batch > 1:
        one_row["mask.calibration_batch"] = 1
    keys = [one_row]
    if train.activation_checkpointing == "none":
        keys.insert(0, {"train.activation_checkpointing": "non_reentrant"})
    if data.max_length >= 64:
        keys.append({"data.max_length": data.max_length // 2})
    if mask.is_scored and mask.score_device == "device" and setup.device == "cuda":
        keys.append({"mask.score_device": "host"})
    for values in filter(None, keys):
        yield (
            " ".join(f"{name}={value}" for name, value in values.items()),
            partial(_with_keys, values=values),
        )
    if _may_be_in_few_bits(setup):
        yield "model.base_format=nf4", partial(_with_keys, values={"model.base_format": "nf4"})
    if not setup.is_offloaded and setup.device == "cuda":
        ours = setup.recipe.deepspeed.config == "zero3_bf16"  # whose twin keeps the base in host memory
        text = "deepspeed.config=zero3_bf16_offload" if ours else "DeepSpeed: offload_param.device=cpu"
        yield text, partial(_with_zero, offload_param={"device": "cpu"})
    small = {"stage3_prefetch_bucket_size": 1_000_000, "stage3_max_reuse_distance": 0}
    text = ", ".join(f"{key}={value}" for key, value in small.items())
    yield f"DeepSpeed: {text}", partial(_with_zero, **small)


def _may_be_in_few_bits(setup: Setup) -> bool:
    """Whether the base is not in few bits, and could be."""
    recipe = setup.recipe
    if (
        recipe.model.base_format is not None
        or recipe.eval.mode == "gathered"
        or recipe.method.name != "sparse"
    ):
        return False
    try:
        return bool(setup.geometry.plain_linears)
    except UserError:
        return False


def _with_keys(setup: Setup, values: dict[str, object]) -> Setup:
    recipe = setup.recipe
    for name, value in values.items():
        section, _, key = name.partition(".")
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    return replace(setup, recipe=recipe)


def _with_zero(setup: Setup, **values) -> Setup:
    return replace(setup, zero={**setup.zero, **values})
