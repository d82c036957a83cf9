"""Tables of masks by layer and module, and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from speft_ds.model.targets import place
from speft_ds.terminal import Console, encodable
from speft_ds.untrusted import printable

if TYPE_CHECKING:
    from speft_ds.sparse.mask import Mask

OTHER = "other"  # the row of weights outside the decoder layers
MAX_WIDTH = 10_000

Cell = tuple[int, int] | None  # (entries, elements), None where the layer has no such module


def density_table(mask: Mask) -> tuple[list[str], list[str], list[list[Cell]]]:
    """Entries and elements by layer and module; weights that share a place are summed.

    Returns:
        Layers, by number and `other` last; modules, in model order; one row of cells per layer.
    """
    cells: dict[tuple[int | None, str], tuple[int, int]] = {}
    for name, index in mask.index.items():
        where = place(name)
        entries, elements = cells.get(where, (0, 0))
        cells[where] = (entries + index.numel(), elements + mask.numel(name))
    layers = sorted({layer for layer, _ in cells if layer is not None})
    rows = [*layers, None] if any(layer is None for layer, _ in cells) else layers
    modules = list(dict.fromkeys(module for _, module in cells))
    labels = [OTHER if layer is None else str(layer) for layer in rows]
    return labels, modules, [[cells.get((layer, module)) for module in modules] for layer in rows]


def total(cells: Sequence[Cell]) -> tuple[int, int]:
    """Entries and elements of all cells together."""
    there = [cell for cell in cells if cell is not None]
    return sum(entries for entries, _ in there), sum(elements for _, elements in there)


def unique_tails(names: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The shortest tail of each name (a sequence of parts) that no other name ends in, or the full name."""
    names = [tuple(name) for name in names]
    tails = []
    for name in names:
        others = {other for other in names if other != name}
        length = 1
        while length < len(name) and any(other[-length:] == name[-length:] for other in others):
            length += 1
        tails.append(name[-length:])
    return tails


def short_modules(modules: list[str]) -> list[str]:
    """`self_attn.q_proj` -> `q_proj`, or as much of the name as tells it from the others."""
    return [".".join(tail) for tail in unique_tails([module.split(".") for module in modules])]


def print_mask_table(mask: Mask) -> None:
    """Print the number of entries by layer (rows) and module (columns), with totals and densities."""
    layers, modules, cells = density_table(mask)
    # Seven modules fit into 80 columns.
    narrow = {"padding": 0, "pad_edge": False, "show_edge": False}
    table = Table(title="trained entries", box=SIMPLE_HEAD, show_footer=True, **narrow)
    columns = [list(column) for column in zip(*cells, strict=True)]
    everything = total([cell for row in cells for cell in row])
    table.add_column("layer", footer="total", justify="right")
    for module, column in zip(short_modules(modules), columns, strict=True):
        table.add_column(plain(module), footer=f"{total(column)[0]:,}", justify="right")
    table.add_column("total", footer=f"{everything[0]:,}", justify="right")
    table.add_column("density", footer=percent(*everything), justify="right")
    for layer, row in zip(layers, cells, strict=True):
        counts = ["-" if cell is None else f"{cell[0]:,}" for cell in row]
        table.add_row(layer, *counts, f"{total(row)[0]:,}", percent(*total(row)))
    print_table(table)


def plain(text: str) -> Text:
    """What a file says, for stdout: no markup, no control characters, on one line, in its encoding."""
    return Text(encodable(" ".join(printable(text).split())))


def print_table(table: Table) -> None:
    """Print a table in its full width: a terminal may wrap its lines, but no number is cut or folded."""
    console = Console()
    widest = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).maximum
    Console(width=max(console.width, widest)).print(table)


def percent(entries: int, elements: int) -> str:
    """A density."""
    return f"{entries / elements:.3%}"


def jaccard_text(value: float) -> str:
    """Four digits; only equal masks show as 1, only disjoint ones as 0."""
    if value in (0.0, 1.0):
        return f"{value:.0f}"
    return f"{min(max(value, 0.0001), 0.9999):.4f}"


def in_bytes(number: float) -> str:
    """`512 bytes`, `4.10 MiB`."""
    power = sum(abs(number) >= 1024**n for n in (1, 2, 3))
    unit = ("bytes", "KiB", "MiB", "GiB")[power]
    return f"{number / 1024**power:.{2 if power else 0}f} {unit}"
