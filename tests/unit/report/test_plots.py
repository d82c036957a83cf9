"""Pictures: SVG in the reader's colours, complete PNGs, the same bytes every time."""

import io
import math
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image, ImageColor

from speft_ds.report import plots
from speft_ds.report.plots import (
    NO_ENTRY,
    NO_WEIGHT,
    Curve,
    curves,
    jaccard_picture,
    length_histogram,
    mask_heat_map,
)
from speft_ds.sparse.mask import Mask
from unit.report.sample import decoder

ODD = "a$b_{.0.$\\frac$ <b>--> \x07"  # neither a formula nor markup
pytestmark = pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_running_mean_against_a_plain_one(size):
    draw = random.Random(0)
    values = [draw.random() for _ in range(50)]
    plain = [sum(values[max(0, n - size + 1) : n + 1]) / min(size, n + 1) for n in range(50)]
    assert plots.running_mean(values, size) == pytest.approx(plain)


LINES = [Curve(ODD, [1, 2, 3], [1.0, 0.5, 0.25]), Curve("", [1, 3], [2.0, 1.0], 1, is_faint=True)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: curves(LINES, ODD, [2]),
        lambda: plots.bars(["training", ODD], [20.0, 1.0], "seconds", lambda value: f"{value:.0f} s"),
        lambda: mask_heat_map(decoder(3, "lm_head.weight"), ODD, "svg"),
    ],
)
def test_an_svg_is_the_same_every_time_takes_the_readers_colours_and_loads_nothing(draw):
    content = draw()
    assert content == draw()
    root, text = ElementTree.fromstring(content), content.decode()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert plots.INK not in text and "currentColor" in text and "prefers-color-scheme:dark" in text
    links = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in text and "<script" not in text


def test_of_many_points_no_extreme_is_lost():
    draw = random.Random(0)
    values = [math.sin(n / 3000) + draw.random() for n in range(25_000)]
    values[12_345], values[20_001] = 9.0, -9.0

    def heights(values):
        """Of the curve, which has the most points: the highest and the lowest."""
        content = curves([Curve("", range(len(values)), values)], "loss").decode()
        path = max(re.findall(r'd="([^"zQ]*)"', content), key=lambda path: path.count("\nL "))
        points = [float(point.split()[-1]) for point in path.strip().splitlines()]
        return [min(points), max(points)], len(points)

    (expected, _), (found, num_points) = heights([0.0, 9.0, -9.0, 0.0]), heights(values)
    assert found == pytest.approx(expected, abs=1.0) and num_points < 5_000


def test_an_axis_from_zero():
    """Half of the height lies below the lower of two values, one of which is twice the other."""

    def span(**options):
        content = curves([Curve("", range(50), [1.0, 2.0] * 25)], "GiB", **options).decode()
        path = max(re.findall(r'd="([^"zQ]*)"', content), key=lambda path: path.count("\nL "))
        heights = [float(point.split()[-1]) for point in path.strip().splitlines()]
        return max(heights) - min(heights)

    assert span(from_zero=True) == pytest.approx(span() / 2, rel=0.02)


NAME = f"{ODD}.weight"
WIDE = [f"block.0.module_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(300)]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: mask_heat_map(decoder(1), ""),
        lambda: mask_heat_map(decoder(80, "lm_head.weight"), ""),
        lambda: mask_heat_map(Mask({NAME: torch.arange(0)}, {NAME: (3, 3)}), "costs $5 or $6_{"),
        lambda: mask_heat_map(Mask({NAME: torch.arange(9)}, {NAME: (3, 3)}), "x" * 300),
        lambda: jaccard_picture(["a", ODD], [[1.0, 0.5], [0.5, 1.0]]),
        lambda: jaccard_picture([f"mask {n}" for n in range(60)], [[0.5] * 60] * 60),
        lambda: length_histogram(torch.tensor([3, 5]).numpy(), torch.tensor([0, 5]).numpy(), 8, ODD),
    ],
)  # fmt: skip
def test_odd_pictures_are_complete(draw):
    with Image.open(io.BytesIO(draw())) as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("L").getcolors()) > 2
        assert 400 < image.width < 3000 and 400 < image.height < 3000


def test_every_target_is_a_cell_with_or_without_entries():
    """A colour for a target without entries, one for a weight that is not there."""
    sizes = {f"layers.{name}.weight": (30, 30) for name in ("0.up", "0.down", "1.up")}

    def colours(entries):
        mask = Mask({name: torch.arange(entries.get(name, 9)) for name in sizes}, sizes)
        with Image.open(io.BytesIO(mask_heat_map(mask, ""))) as image:
            found = {colour: count for count, colour in image.convert("RGB").getcolors(2**16)}
        return [found.get(ImageColor.getrgb(colour), 0) > 5_000 for colour in (NO_ENTRY, NO_WEIGHT)]

    assert colours({}) == [False, True] and colours({"layers.0.down.weight": 0}) == [True, True]


@pytest.mark.parametrize(
    ("mask", "limited"),
    [
        (Mask({n: torch.arange(2) for n in WIDE}, dict.fromkeys(WIDE, (3, 3))), "width"),
        (decoder(400), "height"),
    ],
)
def test_a_picture_of_a_very_large_mask_has_the_largest_size(mask, limited):
    with Image.open(io.BytesIO(mask_heat_map(mask, ""))) as image:
        sizes = {"width": image.width, "height": image.height}
    assert sizes.pop(limited) == plots.LARGEST * 150 and 400 < min(sizes.values()) < 3000


def test_matplotlib_is_imported_for_drawing_only():
    code = "import sys, speft_ds.report.compare, speft_ds.cli.commands.compare_masks as _"
    code += "; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
