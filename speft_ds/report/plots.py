"""All pictures. Each function returns the content of one file: SVG for reports, PNG for files of their own.

matplotlib is imported by `_draw` alone, so that nothing else pays for it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from speft_ds.report.tables import density_table, jaccard_text, short_modules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy import ndarray as Array

    from speft_ds.sparse.mask import Mask

INK = "#010203"  # SVG is drawn with this and shown in the reader's text colour, light or dark
SCHEMES = "svg{color:#1f2328}@media screen and (prefers-color-scheme:dark){svg{color:#e3e5e8}}"
INK_KEYS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
COLOURS = ("#2f7fd0", "#e0752d", "#3a9d5d", "#b657b0", "#c9a227", "#d1495b", "#4fb3bf", "#8d7b68")
STYLE = {
    "text.parse_math": False,  # names may have a $ in them
    "svg.hashsalt": "speft_ds",  # random ids otherwise: the same drawing has the same bytes
    "path.simplify_threshold": 0.5,  # pixels: a curve of 25,000 steps has some 2,400 points
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH, HEIGHT = 4.8, 2.6  # inches, of curves: legible on a telephone, and two beside each other elsewhere
DASHES = ("-", "--", ":", "-.")
NO_ENTRY, NO_WEIGHT = "#444444", "#d3d3d3"  # cells of 0, and of what is not there
LARGEST = 40.0  # inches
MAX_VALUES = 48  # rows or columns up to which every cell of a heat map shows its value
MAX_TICKS = 50


@dataclass(frozen=True)
class Curve:
    """Values at steps; a faint line is thin and not in the legend, nor is one without a label.

    Once the colours are used up, or by `dash`, lines are dashed.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    dash: int = 0
    is_faint: bool = False


def curves(
    lines: Sequence[Curve],
    what: str,
    restarts: Sequence[int] = (),
    from_zero: bool = False,
    over: str | None = None,
) -> bytes:
    """Lines over steps, as SVG; a vertical line at each step after which the run was started again.

    More than two are named below the axes, which a legend inside would cover. With `over`, the lines are over
    that in place of steps, on a logarithmic axis.
    """
    labels = [line.label for line in lines if line.label and not line.is_faint]
    is_below = len(labels) > 2

    def draw(axes: Axes) -> None:
        for line in lines:
            style = {"linewidth": 0.8, "alpha": 0.35} if line.is_faint else {"linewidth": 1.7}
            if len(line.steps) <= 40 and not line.is_faint and not line.dash:
                style |= {"marker": "o", "markersize": 3}
            label = "_" if line.is_faint or not line.label else line.label
            rounds, colour = divmod(line.colour, len(COLOURS))
            style["linestyle"] = DASHES[(rounds + line.dash) % len(DASHES)]
            axes.plot(line.steps, line.values, color=COLOURS[colour], label=label, **style)
        for step in restarts:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        if is_below:
            columns = 2 if max(map(len, labels)) < 30 else 1
            axes.figure.legend(
                loc="outside lower left", frameon=False, ncols=columns, fontsize=8, handlelength=3
            )
        elif labels:
            axes.legend(frameon=False)
        axes.set(xlabel=over or "step", ylabel=what)
        if over:
            places = sorted({place for line in lines for place in line.steps})
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:,.0f}" if place >= 10 else f"{place:.3g}" for place in places])
            axes.set_xticks([], minor=True)
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.margins(x=0.01)
        if from_zero:
            axes.set_ylim(0, 1.1 * max((value for line in lines for value in line.values), default=0) or 1)

    return _draw(WIDTH, HEIGHT + 0.1 * len(labels) * is_below, draw)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    what: str,
    text: Callable[[float], str],
    faint: Collection[str] = (),
) -> bytes:
    """Horizontal bars, the first on top, each with its value, as SVG; some of them `faint`, by name."""

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(names)), values, color=COLOURS[0], height=0.65)
        for name, bar in zip(names, drawn, strict=True):
            bar.set_alpha(0.45 if name in faint else 1.0)
        axes.bar_label(drawn, [text(value) for value in values], padding=4, size=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xlabel=what)
        axes.grid(False, axis="y")

    return _draw(WIDTH, 0.9 + 0.24 * len(names), draw)


def mask_heat_map(mask: Mask, title: str, kind: Literal["png", "svg"] = "png") -> bytes:
    """The density of a mask by decoder layer (rows) and module (columns) of every target.

    Dark grey: a target without entries; light grey: no such weight.
    """
    layers, modules, cells = density_table(mask)
    percent = [[math.nan if cell is None else 100 * cell[0] / cell[1] for cell in row] for row in cells]
    highest = max(value for row in percent for value in row if not math.isnan(value))

    def draw(axes: Axes) -> None:
        _heat_map(axes, percent, highest or 1.0, _percent_text, "trained entries (%)", under=NO_ENTRY)
        axes.set_title(title, size=10, wrap=True)
        axes.set(xlabel="module", ylabel="layer")
        _label(axes.yaxis, layers)
        _label(axes.xaxis, short_modules(modules))

    row_height = 0.21 if len(layers) <= MAX_VALUES else 0.14
    width, height = 1.6 + 0.44 * len(modules), 1.8 + row_height * len(layers)
    return _draw(max(width, 4.0), max(height, 3.0), draw, kind)


def jaccard_picture(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> bytes:
    """The Jaccard indices, [masks][masks] values in [0, 1], of every mask with every mask, as PNG."""

    def draw(axes: Axes) -> None:
        _heat_map(axes, matrix, 1.0, jaccard_text, "Jaccard index")
        axes.set_title("entries in both masks / entries in either", size=10)
        _label(axes.yaxis, names)
        _label(axes.xaxis, names)
        axes.set_aspect("equal")

    side = 2.5 + (0.6 if len(names) <= MAX_VALUES else 0.2) * len(names)
    return _draw(side + 1.0, side, draw, "png")


def length_histogram(lengths: Array, num_label_tokens: Array, max_length: int, title: str) -> bytes:
    """How long rows are, and how many of their tokens are label tokens, as PNG.

    Args:
        lengths, num_label_tokens: [rows] tokens, and label tokens, of each row.
    """

    def draw(axes: Axes) -> None:
        edges = [max_length * n / 40 for n in range(41)]
        labels = ["tokens", "label tokens"]
        axes.hist([lengths, num_label_tokens], bins=edges, label=labels, histtype="stepfilled", alpha=0.6)
        axes.set_title(title, size=10)
        axes.set(xlabel=f"tokens per row (data.max_length={max_length})", ylabel="rows")
        axes.legend()

    return _draw(6.4, 4.0, draw, "png")


def lr_range_curve(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: dict[str, float]
) -> bytes:
    """The losses of a range test over the rate, as PNG; `marks`: what is there -> rate."""

    def draw(axes: Axes) -> None:
        axes.plot(rates, losses, color=COLOURS[0], linewidth=0.8, alpha=0.5, label="after a step")
        axes.plot(rates, smoothed, color=COLOURS[0], label="smoothed")
        for number, (name, rate) in enumerate(marks.items(), 1):
            axes.axvline(rate, color=COLOURS[number], linestyle=":", label=f"{name}: {rate:.1e}")
        axes.set(xscale="log", yscale="log", xlabel="optimizer.lr", ylabel="training loss")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
        axes.legend(frameon=False)

    return _draw(6.4, 4.0, draw, "png")


def pareto_points(points: Sequence[tuple[float, float, float]], front: Collection[int], chosen: int) -> bytes:
    """Trials by (validation loss, trained entries, ms per step), as PNG.

    Args:
        front: numbers of the points that no other is better than in all three; `chosen`: one of them.
    """

    def draw(axes: Axes) -> None:
        losses, entries, times = zip(*points, strict=True)
        drawn = axes.scatter(entries, losses, c=times, s=28, cmap="viridis")
        axes.figure.colorbar(drawn, label="ms per step")
        for which, size, label in ((front, 90, "on the front"), ([chosen], 200, "chosen")):
            x, y = [entries[n] for n in which], [losses[n] for n in which]
            axes.scatter(x, y, s=size, facecolor="none", edgecolor=COLOURS[1], label=label)
        axes.set(xscale="log", xlabel="trained entries", ylabel="validation loss")
        _plain_numbers(axes.xaxis)
        axes.legend(frameon=False)

    return _draw(6.4, 4.0, draw, "png")


def running_mean(values: Sequence[float], size: int) -> list[float]:
    """The mean of the last `size` values, or of as many as there are, at each."""
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value - (values[number - size] if number >= size else 0.0)
        means.append(total / min(number + 1, size))
    return means


def _heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    highest: float,
    text: Callable[[float], str],
    what: str,
    under: str | None = None,
) -> None:
    """Cells coloured from 0 to `highest`, with their values where these are legible, and a colour bar.

    Args:
        under: the colour of 0; None: that of the lowest values.
    """
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(under=under, bad=NO_WEIGHT)
    # Without interpolation: SVG holds one pixel per cell. With a colour of its own, 0 is below the range.
    limits = {"vmin": 1e-9 * highest if under else 0.0, "vmax": highest}
    image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="none", **limits)
    axes.grid(False)
    axes.figure.colorbar(image, label=what, aspect=40, pad=0.02)
    if max(len(values), len(values[0])) > MAX_VALUES:
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                colour = "black" if value > 0.6 * highest else "white"
                axes.text(column, row, text(value), color=colour, ha="center", va="center", size=7)


def _percent_text(value: float) -> str:
    """Two significant digits: 0.050, 0.52, 5.2, 52."""
    return f"{value:#.2g}".removesuffix(".") if 0.0 < value < 99.5 else f"{value:.0f}"


def _label(axis: Axis, names: Sequence[str]) -> None:
    """Name the rows or columns; every n-th of very many. Column names slant."""
    ticks = range(0, len(names), -(-len(names) // MAX_TICKS))
    axis.set_ticks(ticks, [names[tick] for tick in ticks], size=8)
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=45)
        for label in axis.get_ticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _plain_numbers(axis: Axis) -> None:
    """Powers of ten on a logarithmic axis without the mathematics that STYLE turns off."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _draw(
    width: float, height: float, draw: Callable[[Axes], None], kind: Literal["png", "svg"] = "svg"
) -> bytes:
    """Draw on one pair of axes, sizes in inches; the same drawing has the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style = STYLE | (dict.fromkeys(INK_KEYS, INK) if kind == "svg" else {})
    with matplotlib.rc_context(style):
        size = (min(width, LARGEST), min(height, LARGEST))
        figure = Figure(size, dpi=150, layout="compressed", facecolor="none" if kind == "svg" else "white")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    if kind == "png":
        return file.getvalue()
    # Comments are of names, which may be any bytes.
    text = re.sub("<!--.*?-->", "", file.getvalue().decode(), flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("<defs>", f"<style>{SCHEMES}</style>\n<defs>", 1)
    return text.encode()
