"""A plan as text: whether a run fits, what to change if not, and its sums or all of their arithmetic."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from speft_ds.terminal import Console
from speft_ds.tools.plan.make_plan import MARGIN, Plan
from speft_ds.tools.plan.setup import GIB, Line, total

NUM_LARGEST = 3  # kinds of memory that are named without --details


def gib(num_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / 2**20:.2f} MiB" if num_bytes < 0.01 * GIB else f"{num_bytes / GIB:.2f} GiB"


def gradient_in_words(plan: Plan) -> str:
    """What the weight gradient of the mask costs, and by which backend."""
    one, wanted = plan.arithmetic, plan.setup.recipe.train.sparse_backend
    why = f" (as measured on {one.device})" if one.device else " (a rule of thumb)"
    why = why if wanted == "auto" else ""
    shares = f"{one.share:.2%} of a step's multiply-adds by {one.backend}{why}"
    return f"weight gradient: {shares}; a dense one: {one.dense_share:.1%}"


def print_plan(plan: Plan, details: bool = False, console: Console | None = None) -> None:
    """Print a plan, 80 columns wide: whether it fits, what to change, sums; `details`: the arithmetic."""
    console = console or Console()
    setup = plan.setup
    ranks = f"{setup.world_size} {'GPU' if setup.device == 'cuda' else 'CPU rank'}"
    ranks += "" if setup.world_size == 1 else "s"
    verdict, style = ("fits", "bold green") if plan.fits else ("DOES NOT FIT", "bold red")
    kept = f"{gib(plan.limit)} ({plan.gpu_gib:.3g} GiB less {MARGIN:.0%} for the allocator)"
    needed = f"{gib(plan.num_bytes)} on each at the peak, {plan.peak_phase}, of {kept}"
    console.print(f"{verdict}: {setup.recipe.name} on {ranks}: {needed}", style=style, highlight=False)
    if plan.suggestions:
        rows = [
            (gib(num_bytes), "fits" if num_bytes <= plan.limit else "", change)
            for change, num_bytes in plan.suggestions.items()
        ]
        _print_table(console, "what would help: the peak after each change", rows)
    console.print(f"smallest world size that fits: {plan.smallest_world_size or 'none, with this recipe'}")
    console.print(gradient_in_words(plan), highlight=False)
    (_print_details if details else _print_sums)(plan, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    if not details:
        console.print("--details: the arithmetic of each number", highlight=False)


def _print_sums(plan: Plan, console: Console) -> None:
    """The sums of a plan, and the kinds of memory that most of each is."""
    rows = []
    for phase, lines in plan.memory.items():
        largest = sorted(lines, key=lambda line: -line.num_bytes)[:NUM_LARGEST]
        rows.append((phase, gib(total(lines)), ", ".join(f"{e.kind} {gib(e.num_bytes)}" for e in largest)))
    _print_table(console, "memory per rank, and what most of it is", rows)
    if plan.host:
        console.print(f"host memory per rank, besides the process: {gib(total(plan.host))}", highlight=False)
    console.print(f"received per rank and step: {gib(total(plan.traffic))}", highlight=False)
    written = ", ".join(f"{line.kind} {gib(line.num_bytes)}" for line in plan.files)
    console.print(f"on disk: {written}", highlight=False)
    known = [f"{name} {value:,}" for name, (value, _) in plan.steps.items() if value is not None]
    number, how = plan.steps["steps"]
    console.print(", ".join(known) + (f"; steps {how}" if number is None else ""), highlight=False)


def _print_details(plan: Plan, console: Console) -> None:
    """Every number with its arithmetic."""
    setup = plan.setup
    console.print(f"model: {setup.recipe.model.name_or_path}, {setup.geometry.source}", highlight=False)
    for line in setup.geometry.reach:
        console.print(line, highlight=False)
    first, *others = plan.memory.values()
    always = [line for line in first if all(line in lines for lines in others)]
    _print_lines(console, "memory per rank, all the time", always, total(always))
    for phase, lines in plan.memory.items():
        mark = " (the peak)" if phase == plan.peak_phase else ""
        own = [line for line in lines if line not in always]
        _print_lines(console, f"memory per rank, {phase}{mark}: besides, and all together", own, total(lines))
    if plan.host:
        _print_lines(console, "host memory per rank, besides the process", plan.host)
    _print_lines(console, "received per rank and step", plan.traffic, total(plan.traffic))
    _print_lines(console, "on disk", plan.files)
    rows = [(name, "?" if value is None else f"{value:,}", how) for name, (value, how) in plan.steps.items()]
    _print_table(console, "length", rows)
    one = plan.arithmetic
    how = f"{one.mask / one.dense:.2%} of the dense one's {one.dense / 1e9:,.1f}, by {one.backend}"
    rows = [
        ("model", f"{one.model / 1e9:,.1f}", "forward, recomputation, gradients of inputs"),
        ("weight gradient", f"{one.mask / 1e9:,.1f}", how),
    ]
    _print_table(console, "10^9 multiply-adds per rank and micro-batch", rows)


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
