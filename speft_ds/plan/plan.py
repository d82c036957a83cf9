"""What a run will need, from its recipe and the model's configuration: no weights, no GPU.

Memory by kind and phase, traffic, steps, files, whether it fits, and what to change if not. Every line shows
its arithmetic. Imports no torch by itself; counting activations does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from speft_ds.config.deepspeed_config import load_ds_config
from speft_ds.config.optimizer_config import ADAMW
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset_cache import find_cached, request_of
from speft_ds.data.readers import iterate_rows
from speft_ds.data.sampler import Sampler
from speft_ds.errors import UserError
from speft_ds.plan.gathers import BACKWARD, FORWARD, RECOMPUTE
from speft_ds.plan.geometry import Geometry, read_geometry
from speft_ds.plan.memory import GIB, DryRuns, Line, Setup, host, phases, total

MARGIN = 0.1  # of the GPU, left to the allocator: what it holds beyond what is asked for
MOST_RANKS = 4096
Change = tuple[str, Callable[[Setup], Setup]]  # what to type, and the setup after it


@dataclass(frozen=True)
class Suggestion:
    """A change that takes less memory.

    Attributes:
        change: what to type.
        num_bytes: peak of a rank after it.
    """

    change: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What one rank will need, and the whole run.

    Attributes:
        recipe, model: names; source: where the model's configuration came from.
        world_size, gpu_gib: as asked for.
        device: `cuda` or `cpu`, what the plan is for.
        memory: phase -> what one rank holds at its peak.
        host: what lies in host memory besides.
        traffic: what one rank receives in an optimizer step.
        steps: what is known of the length of the run, as name -> (value or None, arithmetic).
        files: what it leaves on disk.
        suggestions: what to change, best first; empty where it fits.
        smallest_world_size: fewest ranks that fit with this recipe; None where no number does.
        notes: what the reader should know.
    """

    recipe: str
    model: str
    source: str
    world_size: int
    gpu_gib: float
    device: str
    memory: dict[str, list[Line]]
    host: list[Line]
    traffic: list[Line]
    steps: dict[str, tuple[int | None, str]]
    files: list[Line]
    suggestions: list[Suggestion] = field(default_factory=list)
    smallest_world_size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.memory, key=lambda phase: total(self.memory[phase]))

    @property
    def num_bytes(self) -> int:
        """Peak of one rank over all phases."""
        return total(self.memory[self.peak_phase])

    @property
    def limit(self) -> int:
        """What may be planned with, margin left out."""
        return _limit(self.gpu_gib)

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.limit

    def as_dict(self) -> dict:
        """As JSON holds it, with the totals."""
        totals = {phase: total(lines) for phase, lines in self.memory.items()}
        facts = {"peak_phase": self.peak_phase, "num_bytes": self.num_bytes, "fits": self.fits}
        return {**asdict(self), "phase_bytes": totals, "limit_bytes": self.limit, **facts}


def make_plan(
    recipe: Recipe,
    world_size: int,
    gpu_gib: float = 80.0,
    num_rows: int | None = None,
    device: str = "cuda",
) -> Plan:
    """The plan of a training run.

    Args:
        world_size: ranks, each with a GPU of `gpu_gib`.
        num_rows: rows of the training data; None: those of the recipe's file, if it is on this machine.
        device: `cpu` plans for ranks on a CPU, whose memory includes that of the process.
    Raises:
        UserError: no configuration of the model at hand, or it does not go with the recipe.
        RecipeError: the batch cannot be shared among so many ranks, or the DeepSpeed configuration is wrong.
    """
    from speft_ds.dtype import multiplies_bfloat16, resolve_dtype  # late: it imports torch

    zero = load_ds_config(recipe, world_size)["zero_optimization"]
    geometry = read_geometry(recipe)
    is_auto = recipe.model.dtype == "auto"
    recipe = resolve_dtype(recipe, device == "cuda" or multiplies_bfloat16("cpu"))
    setup, runs = Setup(recipe, geometry, zero, world_size, device), DryRuns()
    plan = Plan(
        recipe=recipe.name,
        model=recipe.model.name_or_path,
        source=geometry.source,
        world_size=world_size,
        gpu_gib=gpu_gib,
        device=device,
        memory=phases(setup, runs),
        host=host(setup) if device == "cuda" else [],
        traffic=traffic(setup, runs),
        steps=steps(recipe, world_size, num_rows),
        files=files(setup),
        smallest_world_size=smallest_world_size(setup, runs, _limit(gpu_gib)),
        notes=notes(recipe, geometry, device, is_auto),
    )
    return plan if plan.fits else replace(plan, suggestions=list(suggest(setup, runs, plan)))


def _limit(gpu_gib: float) -> int:
    return int(gpu_gib * (1 - MARGIN) * GIB)


def peak_bytes(setup: Setup, runs: DryRuns) -> int:
    return max(map(total, phases(setup, runs).values()))


def traffic(setup: Setup, runs: DryRuns) -> list[Line]:
    """What one rank receives in an optimizer step."""
    train, ranks, b = setup.recipe.train, setup.world_size, setup.itemsize
    if ranks == 1:
        return [Line("weights and gradient", 0, "a lone rank has all of them")]
    peak = runs.peak(setup, "entries", train.micro_batch, setup.recipe.data.max_length)
    rounds = train.global_batch // (train.micro_batch * ranks)
    lines = []
    for kind in (FORWARD, RECOMPUTE, BACKWARD):
        count = peak.traffic[kind]
        formula = f"{count:,} weights x {b} B x {ranks - 1}/{ranks} x {rounds} micro-batches"
        lines.append(Line(f"weights, {kind}", count * b * (ranks - 1) // ranks * rounds, formula))
    k = setup.num_trained
    formula = f"{k:,} entries x 4 B x {ranks - 1}/{ranks} x {rounds} micro-batches"
    return [
        *(line for line in lines if line.num_bytes),
        Line("gradient", 4 * k * (ranks - 1) // ranks * rounds, formula),
    ]


def steps(recipe: Recipe, world_size: int, num_rows: int | None) -> dict[str, tuple[int | None, str]]:
    """Sequences of an epoch, steps and tokens, with what they follow from; None where that is not known."""
    train, length = recipe.train, recipe.data.max_length
    order, why = (Sampler((num_rows,), None, 0), "--rows") if num_rows else find_order(recipe)
    batch = f"{train.global_batch} sequences a step"
    known = {
        "sequences an epoch": (len(order) if order else None, why),
        "accumulation": (
            train.global_batch // (train.micro_batch * world_size),
            f"{batch} / ({train.micro_batch} x {world_size} ranks)",
        ),
        "tokens a step": (train.global_batch * length, f"at most: {batch} x {length:,}"),
    }
    if train.steps is not None:
        known["steps"] = (train.steps, "train.steps")
    elif order is None:
        known["steps"] = (None, "not known without the number of rows: --rows N, or train.steps=N")
    else:
        number = order.num_steps(train.global_batch, None, train.epochs)
        known["steps"] = (number, f"{len(order):,} sequences x {train.epochs:g} epochs / {batch}")
    number = known["steps"][0]
    tokens = None if number is None else number * train.global_batch * length
    formula = "steps x tokens a step" if number is None else f"at most: {number:,} steps x tokens a step"
    return {**known, "tokens": (tokens, formula)}


def find_order(recipe: Recipe) -> tuple[Sampler | None, str]:
    """The order of the rows that are on this machine, and how they were counted; None where they are not."""
    data = recipe.data
    try:
        if corpus := find_cached(request_of(recipe)):
            kind = "packs" if corpus.is_packed else "rows"
            return Sampler(corpus.sizes, data.weights, recipe.seed), f"tokenised before: {kind}"
        sizes = [sum(1 for _ in iterate_rows(source)) for source in data.sources]
    except UserError as error:
        return None, f"{error.what}: --rows N"
    why = f"rows as they are in {', '.join(source.path for source in data.sources)}"
    if data.select != "all":
        kept = min(data.select_rows, sum(sizes))
        sizes, why = [kept], f"data.select_rows of the rows in {', '.join(s.path for s in data.sources)}"
    why += ", before packing: speft data tells exactly" if data.packing else ""
    weights = data.weights if data.select == "all" else None
    return Sampler(tuple(sizes), weights, recipe.seed), why


def files(setup: Setup) -> list[Line]:
    """What the run writes."""
    k = setup.num_trained
    header = 2 * sum(len(name) + 70 for name in setup.geometry.targets)
    formula = f"{k:,} entries x about 6 B (delta 4, coded index 1 to 3) + names"
    if setup.recipe.mask.schedule == "periodic":
        formula += "; more with every change of the mask"
    each = checkpoint_entry(setup.recipe)
    checkpoint = f"about {k:,} entries x {each} B ({setup.recipe.optimizer.name})"
    return [Line("adapter", 6 * k + header, formula), Line("a checkpoint", each * k, checkpoint)]


def checkpoint_entry(recipe: Recipe) -> int:
    """Bytes of an entry in a checkpoint: index and delta, and what the optimizer keeps of it."""
    optimizer, mask = recipe.optimizer, recipe.mask
    kept = {"sgd": 4 * (optimizer.momentum > 0), "lion": 4, "adamw": 8}.get(optimizer.name, 10)
    if optimizer.name in ADAMW and mask.has_entry_steps:
        kept += 4  # its entry_step
    if "8bit" in optimizer.name and mask.schedule in ("periodic", "drop_grow"):
        kept += 4  # its slot
    return 8 + kept


def notes(recipe: Recipe, geometry: Geometry, device: str, is_auto: bool) -> list[str]:
    """What the numbers leave out or take for granted; `is_auto`: its dtype was left to the hardware."""
    found = ["every row is taken to be as long as data.max_length; entries to be spread evenly over ranks"]
    if is_auto:
        whose = "a GPU that multiplies bfloat16" if device == "cuda" else "the CPU of this machine"
        found.append(f"model.dtype=auto is planned as {recipe.model.dtype}, for {whose}")
    if geometry.num_head:
        found.append(f"the classification head's {geometry.num_head:,} weights are all trained")
    if recipe.mask.schedule == "periodic":
        found.append("entries that leave a periodic mask stay in memory, about 14 bytes each: not counted")
    if recipe.eval.tasks:
        found.append("evaluation is not counted: eval.batch_size is its own to choose")
    if device == "cpu":
        found.append("glibc keeps freed memory, half as much again: MALLOC_MMAP_THRESHOLD_=65536 avoids it")
    return found


def smallest_world_size(setup: Setup, runs: DryRuns, limit: int) -> int | None:
    """The fewest ranks that fit and share the global batch; None where no number does."""
    train = setup.recipe.train
    micro_batches = train.global_batch // train.micro_batch
    for ranks in range(1, min(micro_batches, MOST_RANKS) + 1):
        if micro_batches % ranks == 0 and peak_bytes(replace(setup, world_size=ranks), runs) <= limit:
            return ranks
    return None


def suggest(setup: Setup, runs: DryRuns, plan: Plan) -> Iterator[Suggestion]:
    """Changes that help, each by itself, best first; then, if none is enough, the first of them together."""
    helpful = []
    for text, change in changes(setup, plan.smallest_world_size):
        size = peak_bytes(change(setup), runs)
        if size < 0.99 * plan.num_bytes:
            helpful.append((size, text, change))
    helpful.sort(key=lambda one: one[0])
    yield from (Suggestion(text, size) for size, text, _ in helpful)
    if not helpful or helpful[0][0] <= plan.limit:
        return
    together, texts, best = setup, [], plan.num_bytes
    for _, text, change in helpful:
        size = peak_bytes(change(together), runs)
        if size < best:
            together, best = change(together), size
            texts.append(text)
        if best <= plan.limit:
            break
    if len(texts) > 1:
        yield Suggestion(" ".join(texts), best)


def changes(setup: Setup, smallest: int | None) -> Iterator[Change]:
    """Everything that could take less memory with this recipe."""
    train, data, mask = setup.recipe.train, setup.recipe.data, setup.recipe.mask
    if smallest is not None and smallest > setup.world_size:
        yield f"--world {smallest}", lambda s: replace(s, world_size=smallest)
    elif train.global_batch // train.micro_batch % (2 * setup.world_size) == 0:
        yield f"--world {2 * setup.world_size}", lambda s: replace(s, world_size=2 * s.world_size)
    if train.activation_checkpointing == "none":
        yield _key("train", "activation_checkpointing", "non_reentrant")
    is_calibrated = mask.needs_calibration and mask.calibration_batch > 1
    if train.micro_batch > 1 or is_calibrated:
        one_row = [_key("train", "micro_batch", 1)] if train.micro_batch > 1 else []
        one_row += [_key("mask", "calibration_batch", 1)] if is_calibrated else []
        yield _all(one_row)
    if data.max_length >= 64:
        yield _key("data", "max_length", data.max_length // 2)
    if mask.is_scored and mask.score_device == "device" and setup.device == "cuda":
        yield _key("mask", "score_device", "host")
    if not setup.is_offloaded and setup.device == "cuda":
        zero = {**setup.zero, "offload_param": {"device": "cpu"}}
        yield "DeepSpeed: offload_param.device=cpu", lambda s: replace(s, zero={**s.zero, **zero})
    small = {"stage3_prefetch_bucket_size": 1_000_000, "stage3_max_reuse_distance": 0}
    text = "DeepSpeed: " + ", ".join(f"{key}={value}" for key, value in small.items())
    yield text, lambda s: replace(s, zero={**s.zero, **small})


def _key(section: str, key: str, value: object) -> Change:
    """A recipe key set to a value."""

    def change(setup: Setup) -> Setup:
        changed = getattr(setup.recipe, section).model_copy(update={key: value})
        return replace(setup, recipe=setup.recipe.model_copy(update={section: changed}))

    return f"{section}.{key}={value}", change


def _all(several: list[Change]) -> Change:
    def change(setup: Setup) -> Setup:
        for _, one in several:
            setup = one(setup)
        return setup

    return " ".join(text for text, _ in several), change


def gib(num_bytes: int) -> str:
    """Bytes as people read them."""
    if num_bytes < 0.01 * GIB:
        return f"{num_bytes / 2**20:.2f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan, 80 columns wide."""
    console = console or Console()
    place = "a GPU" if plan.device == "cuda" else "a rank"
    console.print(f"{plan.recipe}: {plan.model} on {plan.world_size} rank(s)", highlight=False)
    console.print(f"configuration: {plan.source}", highlight=False)
    phases_of = list(plan.memory.values())
    always = [line for line in phases_of[0] if all(line in lines for lines in phases_of)]
    _print_lines(console, "memory of a rank, all the time", always, total(always))
    for phase, lines in plan.memory.items():
        mark = " (the peak)" if phase == plan.peak_phase else ""
        own = [line for line in lines if line not in always]
        together = total(lines)
        _print_lines(console, f"memory of a rank, {phase}{mark}: besides, and all together", own, together)
    if plan.host:
        _print_lines(console, "host memory of a rank, besides the process", plan.host)
    _print_lines(console, "received by a rank in a step", plan.traffic, total(plan.traffic))
    _print_lines(console, "on disk", plan.files)
    rows = [(name, "?" if value is None else f"{value:,}", how) for name, (value, how) in plan.steps.items()]
    _print_table(console, "length", rows)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    kept = f"{plan.gpu_gib:g} GiB less {MARGIN:.0%} for the allocator = {gib(plan.limit)}"
    console.print(f"{verdict}: {gib(plan.num_bytes)} at the peak, {plan.peak_phase}; {place} has {kept}")
    smallest = plan.smallest_world_size
    console.print(f"smallest world size that fits: {smallest or 'none, with this recipe'}")
    if plan.suggestions:
        rows = [
            (gib(s.num_bytes), "fits" if s.num_bytes <= plan.limit else "", s.change)
            for s in plan.suggestions
        ]
        _print_table(console, "what would help: the peak after each change", rows)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)


def _print_lines(console: Console, title: str, lines: list[Line], sum_: int | None = None) -> None:
    rows = [(line.kind, gib(line.num_bytes), line.formula) for line in lines]
    _print_table(console, title, rows + ([("total", gib(sum_), "")] if sum_ is not None else []))


def _print_table(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, show_header=False, title_justify="left", padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
