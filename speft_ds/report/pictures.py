"""The pictures of a report: SVG in the reader's colours, the heat map as PNG. Steps on x, one quantity each.

matplotlib is imported by the functions that draw, so that nothing else pays for it.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from speft_ds.sparse.mask import Mask

INK = "#010203"  # drawn with this, shown in the colour of the text around, in the dark, too
SCHEMES = "svg{color:#1f2328}@media screen and (prefers-color-scheme:dark){svg{color:#e3e5e8}}"
COLOURS = ("#2f7fd0", "#e0752d", "#3a9d5d", "#b657b0", "#c9a227", "#d1495b", "#4fb3bf", "#8d7b68")
WIDE, HALF = (6.4, 2.9), (4.8, 2.6)  # inches
MOST_POINTS = 800  # of a line; more are thinned
INK_KEYS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")


@dataclass(frozen=True)
class Line:
    """Values at steps; `is_faint` is drawn thin, behind the others, `dots` where values are few."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: int = 0
    is_faint: bool = False


def curves(
    lines: Sequence[Line], what: str, starts: Sequence[int] = (), size: tuple[float, float] = WIDE
) -> bytes:
    """Lines over steps, as SVG.

    Args:
        what: the quantity and its unit.
        starts: steps after which the run was started again: a vertical line each.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            steps, values = thinned(line.steps, line.values)
            few = len(steps) <= 40 and not line.is_faint
            style = {"linewidth": 0.8, "alpha": 0.35} if line.is_faint else {"linewidth": 1.7}
            label = f"_{line.label}" if line.is_faint or not line.label else line.label
            colour = COLOURS[line.colour % len(COLOURS)]
            axes.plot(steps, values, color=colour, label=label, marker="o" if few else "", ms=3, **style)
        for step in starts:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        if any(line.label and not line.is_faint for line in lines):
            axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel=what)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.01)

    return svg(size, draw)


def bars(names: Sequence[str], values: Sequence[float], what: str, text: Callable[[float], str]) -> bytes:
    """Horizontal bars, the first on top, each with its value, as SVG."""

    def draw(axes: Axes) -> None:
        drawn = axes.barh(range(len(names)), values, color=COLOURS[0], height=0.65)
        axes.bar_label(drawn, [text(value) for value in values], padding=4, size=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set(xlabel=what)
        axes.grid(False, axis="y")

    return svg((WIDE[0], 0.9 + 0.27 * len(names)), draw)


def heat_map(mask: Mask, title: str) -> bytes:
    """The density of a mask by layer and module, as PNG."""
    from speft_ds.report.plots import mask_heat_map

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.png"
        mask_heat_map(path, mask, title)
        return path.read_bytes()


def svg(size: tuple[float, float], draw: Callable[[Axes], None]) -> bytes:
    """Draw on one pair of axes; the same drawing has the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        **dict.fromkeys(INK_KEYS, INK),
        "text.parse_math": False,  # names may have a $ in them
        "svg.hashsalt": "speft_ds",  # else ids differ from drawing to drawing
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="compressed", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        content = io.StringIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    text = content.getvalue().replace(INK, "currentColor")
    return text.replace("<defs>", f"<style>{SCHEMES}</style>\n<defs>", 1).encode()


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `MOST_POINTS` points, among them the lowest and the highest of every stretch."""
    if len(steps) <= MOST_POINTS:
        return list(steps), list(values)
    size = math.ceil(2 * len(steps) / MOST_POINTS)
    kept: set[int] = {len(steps) - 1}
    for first in range(0, len(steps), size):
        stretch = range(first, min(first + size, len(steps)))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def running_mean(values: Sequence[float], size: int) -> list[float]:
    """The mean of the last `size` values, or of as many as there are, at each."""
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value - (values[number - size] if number >= size else 0.0)
        means.append(total / min(number + 1, size))
    return means
