"""What pictures are drawn from, and that they are SVG in the reader's colours."""

import math
import random
from xml.etree import ElementTree

import pytest

from speft_ds.report.pictures import INK, MOST_POINTS, Line, bars, curves, running_mean, thinned


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_running_mean_against_a_plain_one(size):
    draw = random.Random(0)
    values = [draw.random() for _ in range(50)]
    plain = [sum(values[max(0, n - size + 1) : n + 1]) / min(size, n + 1) for n in range(50)]
    assert running_mean(values, size) == pytest.approx(plain)


def test_few_points_are_all_drawn():
    assert thinned([1, 2, 5], [3.0, 1.0, 2.0]) == ([1, 2, 5], [3.0, 1.0, 2.0])


def test_of_many_points_no_extreme_is_lost():
    draw = random.Random(0)
    values = [math.sin(n / 3000) + draw.random() for n in range(25_000)]
    values[12_345], values[20_001] = 9.0, -9.0
    steps, kept = thinned(range(25_000), values)
    assert len(steps) <= MOST_POINTS + 1 and steps == sorted(set(steps)) and steps[-1] == 24_999
    assert [values[step] for step in steps] == kept
    assert (steps[kept.index(9.0)], steps[kept.index(-9.0)]) == (12_345, 20_001)


def texts(content):
    """The elements of an SVG, and all text in it."""
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return root, content.decode()


def test_a_drawing_is_the_same_every_time_and_takes_the_readers_colours():
    lines = [Line("a$b_{", [1, 2, 3], [1.0, 0.5, 0.25]), Line("", [1, 3], [2.0, 1.0], 1, is_faint=True)]
    content = curves(lines, "loss", [2])
    assert content == curves(lines, "loss", [2])
    _, text = texts(content)
    assert INK not in text and "currentColor" in text and "prefers-color-scheme:dark" in text


def test_bars_have_one_rectangle_each():
    content = bars(["training", "<data>"], [20.0, 1.0], "seconds", lambda value: f"{value:.0f} s")
    assert len(texts(content)[0].findall(".//{*}clipPath")) == 1
    assert content == bars(["training", "<data>"], [20.0, 1.0], "seconds", lambda value: f"{value:.0f} s")


def test_nothing_in_a_drawing_is_loaded_from_elsewhere():
    root, text = texts(curves([Line("a", [1, 2], [1.0, 2.0])], "x"))
    links = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
    assert links and all(link.startswith("#") for link in links)
    assert "@import" not in text and "<script" not in text
