"""Reports as tests read them: as a browser parses the page, and as GitHub renders the markdown."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page as a list of (tag, attributes), its table cells by row, and all text; tags must nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.pairs, self.text, self.open = [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] if tag not in VOID else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "dt":
            self.pairs.append(["", ""])

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("dt", "dd"):
            self.pairs[-1][self.open[-1] == "dd"] += data

    def row(self, name, number=0):
        """The cells beside the `number`-th row of this name."""
        return [row[1:] for row in self.rows if row and row[0] == name][number]

    def attributes(self, tag, name):
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def rendered(folder):
    """The markdown as GitHub would show it, HTML in it as it is."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    return Page(MarkdownIt("commonmark").enable("table").render(text))
