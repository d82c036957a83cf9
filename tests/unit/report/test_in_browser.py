"""Reports in a real browser: nothing to complain of, every picture there, nothing asked for elsewhere."""

import json
import re
import shutil
import subprocess
from html import escape

import pytest
from PIL import Image

from speft_ds.report.compare import write_comparison
from speft_ds.report.page import write_report
from unit.report.sample import make_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
PROBE = """<script>
const found = (page, width) => ({
    images: [...page.images].map(image => image.naturalWidth),
    scale: Math.min(...[...page.images].map(image => image.clientWidth / image.naturalWidth)),
    box: (r => [r.left, r.top, r.right, r.bottom])(page.images[0].getBoundingClientRect()),
    overflow: page.documentElement.scrollWidth - width});
addEventListener("load", () => document.title = JSON.stringify({
    ...found(document, innerWidth),
    narrow: found(document.querySelector("iframe").contentDocument, 400)}))</script>"""
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')


def look(page, folder, width, dark):
    """What a browser finds in a page, the lines of its console, and a picture of the page."""
    size = f"--window-size={width},7000 --blink-settings=preferredColorScheme={0 if dark else 1}"
    common = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr {size}"
    command = [BROWSER, *common.split(), f"--user-data-dir={folder / 'profile'}"]
    shot = [f"--screenshot={folder / 'page.png'}", page.absolute().as_uri()]
    console = subprocess.run([*command, *shot], capture_output=True, text=True, timeout=300).stderr
    # A copy that may run a script says what the browser made of it.
    text = POLICY.sub("", page.read_text(encoding="utf-8"))
    narrow = f'<iframe style="position: absolute; border: 0; width: 400px" srcdoc="{escape(text)}"></iframe>'
    (folder / "probe.html").write_text(text + narrow + PROBE, encoding="utf-8")
    dump = ["--dump-dom", (folder / "probe.html").as_uri()]
    found = subprocess.run([*command, *dump], capture_output=True, text=True, timeout=300).stdout
    return json.loads(re.search("<title>(.*?)</title>", found)[1]), console.count("CONSOLE")


@pytest.mark.parametrize(
    ("is_comparison", "width", "dark"), [(False, 500, False), (False, 1200, True), (True, 1200, False)]
)
def test_a_page_opens_without_a_complaint_in_the_readers_colours(
    finished, tmp_path, is_comparison, width, dark
):
    if is_comparison:
        write_comparison([finished, make_run(tmp_path / "run", "optimizer.lr=1e-4")], tmp_path)
    else:
        write_report(finished, tmp_path)
    found, complaints = look(tmp_path / "report.html", tmp_path, width, dark)
    assert complaints == 0
    assert len(found["images"]) == (5 if is_comparison else 8) and min(found["images"]) > 100
    assert found["overflow"] == found["narrow"]["overflow"] == 0  # what is wide scrolls by itself
    assert found["narrow"]["scale"] > 0.7  # on a telephone: letters of 7 points are of 5 or more
    with Image.open(tmp_path / "page.png") as image:
        shades = image.convert("L").crop([round(value) for value in found["box"]])
    paper = max(range(256), key=shades.histogram().__getitem__)
    darkest, lightest = shades.getextrema()
    assert (paper < 40 and lightest > 200) if dark else (paper > 240 and darkest < 60)


def test_a_page_that_loads_something_would_be_noticed(finished, tmp_path):
    """The tests above can fail: the page's own policy makes the browser complain."""
    write_report(finished, tmp_path)
    policy = POLICY.search((tmp_path / "report.html").read_text())[0]
    (tmp_path / "bad.html").write_text(f"<head>{policy}<title>bad</title></head><img src='nowhere.png'>")
    found, complaints = look(tmp_path / "bad.html", tmp_path, 1200, dark=False)
    assert complaints >= 1 and found["images"] == [0]
