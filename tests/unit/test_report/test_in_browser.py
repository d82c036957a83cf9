"""Reports in a real browser: nothing to complain of, every picture there, nothing asked for elsewhere."""

import pytest
from PIL import Image

from speft_ds.report import write_comparison, write_report
from unit.test_report import browser
from unit.test_report.sample import make_run

pytestmark = pytest.mark.skipif(
    browser.PATH is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed"
)


@pytest.fixture(scope="module")
def tab():
    opened = browser.Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, finished):
    """A report of one run, and one of two."""
    folder = tmp_path_factory.mktemp("pages")
    write_report(finished, folder / "one")
    write_comparison([finished, make_run(folder / "run", "optimizer.lr=1e-4")], folder / "two")
    return {"one": folder / "one" / "report.html", "two": folder / "two" / "report.html"}


@pytest.mark.parametrize("page", ["one", "two"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_report_opens_without_a_complaint(tab, pages, page, width):
    tab.open(pages[page], width)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [pages[page].absolute().as_uri()]
    widths = tab.run("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == (8 if page == "one" else 5) and min(widths) > 100
    assert tab.run("document.documentElement.scrollWidth") == width  # tables scroll by themselves
    assert tab.run("document.querySelectorAll('section').length") >= 5


def test_complaints_and_requests_would_be_noticed(tab, tmp_path):
    """The test above can fail."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='nowhere.png'><script>console.error('no'); missing()</script>")
    tab.open(page)
    assert len(tab.complaints) >= 2 and len(tab.requests) == 2
    assert tab.run("document.images[0].naturalWidth") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_pages_and_pictures_follow_the_readers_colours(tab, pages, tmp_path, dark):
    tab.open(pages["one"], dark=dark)
    tab.picture(tmp_path / "page.png")
    place = tab.run("(r => [r.left, r.top, r.right, r.bottom])(document.images[0].getBoundingClientRect())")
    with Image.open(tmp_path / "page.png") as image:
        picture = image.convert("L").crop([round(value) for value in place])
    shades = picture.histogram()
    paper = shades.index(max(shades))
    darkest, lightest = picture.getextrema()
    assert (paper < 40 and lightest > 200) if dark else (paper > 240 and darkest < 60)
