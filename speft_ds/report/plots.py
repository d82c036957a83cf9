"""Pictures (PNG): the density of a mask by layer and module, and how far masks overlap.

matplotlib is imported by the functions that draw, so that nothing else pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speft_ds.io import flush_to_disk, replacing
from speft_ds.report.tables import density_table, jaccard_text, short_modules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy import ndarray as Array

    from speft_ds.sparse.mask import Mask

MOST_VALUES = 48  # rows or columns up to which every cell shows its value
MOST_TICKS = 50
LARGEST = 40.0  # inches


def mask_heat_map(path: Path, mask: Mask, title: str) -> None:
    """Draw the density of a mask by decoder layer (rows) and module (columns); grey where there is none.

    Raises:
        OSError: the file cannot be written.
    """
    layers, modules, cells = density_table(mask)
    percent = [[math.nan if cell is None else 100 * cell[0] / cell[1] for cell in row] for row in cells]
    highest = max(value for row in percent for value in row if not math.isnan(value))

    def draw(axes: Axes) -> None:
        _heat_map(axes, percent, highest or 1.0, _percent_text, "trained entries (%)")
        axes.set_title(title, size=10, wrap=True)
        axes.set(xlabel="module", ylabel="layer")
        _label(axes.yaxis, layers)
        _label(axes.xaxis, short_modules(modules))

    row_height = 0.21 if len(layers) <= MOST_VALUES else 0.14
    _save(path, 2.6 + 0.65 * len(modules), 1.8 + row_height * len(layers), draw)


def jaccard_picture(path: Path, names: Sequence[str], matrix: Sequence[Sequence[float]]) -> None:
    """Draw the Jaccard indices of every mask (rows) with every mask (columns).

    Args:
        names: one a mask; matrix: [masks][masks] values in [0, 1].
    Raises:
        OSError: the file cannot be written.
    """

    def draw(axes: Axes) -> None:
        _heat_map(axes, matrix, 1.0, jaccard_text, "Jaccard index")
        axes.set_title("entries in both masks / entries in either", size=10)
        _label(axes.yaxis, names)
        _label(axes.xaxis, names)
        axes.set_aspect("equal")

    side = 2.5 + 0.6 * len(names)
    _save(path, side + 1.0, side, draw)


def length_histogram(path: Path, lengths: Array, num_learnt: Array, max_length: int, title: str) -> None:
    """Draw how long rows are, in tokens, and how much of them is learnt.

    Args:
        lengths, num_learnt: [rows] tokens, and learnt tokens, of each row.
    Raises:
        OSError: the file cannot be written.
    """

    def draw(axes: Axes) -> None:
        edges = [max_length * n / 40 for n in range(41)]
        axes.hist(
            [lengths, num_learnt],
            bins=edges,
            label=["tokens", "learnt tokens"],
            histtype="stepfilled",
            alpha=0.6,
        )
        axes.set_title(title, size=10)
        axes.set(xlabel=f"tokens a row (data.max_length={max_length})", ylabel="rows")
        axes.legend()

    _save(path, 6.4, 4.0, draw)


def _heat_map(
    axes: Axes, values: Sequence[Sequence[float]], highest: float, text: Callable[[float], str], what: str
) -> None:
    """Cells coloured from 0 to `highest`, with their values where these are legible, and a colour bar."""
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=highest)
    axes.set_facecolor("lightgrey")  # seen where a value is NaN
    axes.figure.colorbar(image, label=what, aspect=30)
    if max(len(values), len(values[0])) > MOST_VALUES:
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                colour = "black" if value > 0.6 * highest else "white"
                axes.text(column, row, text(value), color=colour, ha="center", va="center", size=7)


def _percent_text(value: float) -> str:
    """Two digits that count: 0.050, 0.52, 5.2, 52."""
    return f"{value:#.2g}".removesuffix(".") if 0.0 < value < 99.5 else f"{value:.0f}"


def _label(axis: Axis, names: Sequence[str]) -> None:
    """Name the rows or columns; every n-th of very many. Column names slant."""
    ticks = range(0, len(names), -(-len(names) // MOST_TICKS))
    axis.set_ticks(ticks, [names[tick] for tick in ticks], size=8)
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=45)
        for label in axis.get_ticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _save(path: Path, width: float, height: float, draw: Callable[[Axes], None]) -> None:
    """Draw on one pair of axes and write a PNG atomically; sizes in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # names may have a $ in them
        size = (min(max(width, 4.0), LARGEST), min(max(height, 3.0), LARGEST))
        figure = Figure(figsize=size, dpi=150, layout="compressed")
        draw(figure.subplots())
        with replacing(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)
            flush_to_disk(temporary)
