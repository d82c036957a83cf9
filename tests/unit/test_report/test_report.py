"""The report of one run: its numbers, its words where something is missing, and that files inject nothing."""

import json
import shutil
from html.parser import HTMLParser

import pytest
import torch
from markdown_it import MarkdownIt

from speft_ds.errors import UserError
from speft_ds.report import print_summary, summary, write_report
from speft_ds.report.build import report_of
from speft_ds.report.markdown import to_markdown
from speft_ds.report.run import read_run
from speft_ds.sparse.mask import Mask, save_mask
from unit.test_report.sample import (
    NUM_STEPS,
    evaluation,
    facts,
    make_run,
    metrics,
    score,
    write_json,
)

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page as a list of (tag, attributes), its table cells, and all text; tags must nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data.replace("\xa0", " ")


def page_of(folder):
    return Page((folder / "report.html").read_text())


def rendered(folder):
    """The markdown as GitHub would show it, HTML in it as it is."""
    return Page(MarkdownIt("commonmark").enable("table").render((folder / "report.md").read_text()))


@pytest.fixture(scope="module")
def written(tmp_path_factory, finished):
    """The folder of the finished run's report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(finished, folder)
    return folder


@pytest.fixture
def run(tmp_path, finished):
    """A copy of the finished run, to be damaged, with one curve: the pictures are what takes the time."""
    copy = shutil.copytree(finished, tmp_path / "quick")
    lines = [{"step": line["step"], "loss": line["loss"]} for line in metrics()]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def text_of(run):
    write_report(run)
    assert rendered(run).cells
    return page_of(run).text


def test_the_verdict_is_computed_from_the_numbers(written):
    text = page_of(written).text
    for said in (
        "The run is finished: 60 of 60 steps.",
        "Better: json_task exact_match (strict-match) from 0.0% to 99.2% (+99.2 points, 248 standard "
        "errors); arc_easy acc from 41.0% to 61.0% (+20.0 points, 6.4 standard errors).",
        "Worse: wikitext bits_per_byte from 0.9 to 0.95 (+0.05, 3.5 standard errors).",
        "Not clearly changed: winogrande acc from 52.0% to 52.5% (+0.5 points, 0.3 standard errors).",
        "the tuned model beats the best prompt by hand (4-shot, 47.0%; 4.5 standard errors apart)",
        "Forgotten: piqa acc from 68.0% to 61.0% (-7.0 points, 4.5 standard errors).",
        "The perplexity of general text rose from 15 to 15.6 (+4.0%).",
        "1 step(s) were skipped",
    ):
        assert said in text, said
    lines = metrics()
    validation = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    lowest = min(validation, key=validation.get)
    assert f"it was lowest at step {lowest} ({validation[lowest]:.4g})" in text
    tokens = sum(line["num_tokens"] for line in lines[3:]) / sum(line["step_ms"] for line in lines[3:])
    assert f"{1000 * tokens:,.0f} tokens/s" in text


def test_every_section_says_how_its_numbers_were_made(written):
    text = page_of(written).text
    for said in (
        "lm-eval 0.4.13, 0-shot, the first 500 documents of a task, chat template on, seed 0, batches of 16, "
        "2 rank(s), sharded.",
        "± is lm-eval's standard error over documents, not over seeds.",
        "Taken over from an earlier run with the same base and tasks: before",
        "20,000 tokens of general.txt",
        "tokens of the global batch over the seconds of the step",
        "these are of its last start alone",
        "the run was started again after step 20",
        "changed nothing: 30.",
    ):
        assert said in text, said


def test_the_prompts_spread_is_minimum_median_maximum(written):
    cells = page_of(written).cells
    at = cells.index("arc_easy acc, base")
    assert cells[at + 1 : at + 6] == ["3", "37.0%", "41.0%", "43.0%", "6.0 points"]
    at = cells.index("arc_easy acc, tuned")
    assert cells[at + 1 : at + 6] == ["3", "59.0%", "61.0%", "62.0%", "3.0 points"]


def test_page_and_markdown_have_the_same_cells_and_pictures(written):
    page, markdown = page_of(written), rendered(written)
    shown = [cell for cell in page.cells if cell.strip()]
    rest = iter(markdown.cells)  # the figures are a table there, too
    assert all(cell in rest for cell in shown) and len(shown) > 150
    sources = [attributes["src"] for tag, attributes in markdown.tags if tag == "img"]
    assert all((written / source).stat().st_size > 500 for source in sources)
    assert len(sources) == len([tag for tag, _ in page.tags if tag == "img"]) == 8


def test_the_report_is_a_function_of_the_folder(finished, written, tmp_path):
    before = sorted(finished.rglob("*"))
    files = [tmp_path / "out" / name for name in ("report.html", "report.md")]
    assert write_report(finished, tmp_path / "out") == files
    names = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [
        (written / name).read_bytes() for name in names
    ]
    assert not list(written.rglob("*.tmp")) and sorted(finished.rglob("*")) == before


def test_the_page_needs_nothing_else(written):
    tags = page_of(written).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "iframe", "object", "video", "form"})
    for tag, attributes in tags:
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("data:", "#")), (tag, address)
        assert not any(name.startswith("on") for name in attributes)


# What is missing or damaged


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("run.json", "there is no run.json"),
        ("recipe.yaml", "there is no recipe.yaml"),
        ("metrics.jsonl", "there is no metrics.jsonl"),
        ("eval", "No task was scored"),
        ("adapter", "There is no adapter and no mask in the folder"),
        ("adapter/adapter.json", "there is no adapter.json"),
        ("adapter/adapter.safetensors", "No map of the mask"),
        ("checkpoints", "none kept"),
        ("eval/before.json", "It was scored only after training"),
        ("eval/after.json", "It was scored only before training"),
        ("checkpoints/step_000040/COMPLETE", "step_000040 does not count"),
    ],
)
def test_what_is_missing_is_said(run, missing, said):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in text_of(run)


@pytest.mark.parametrize("file", ["run.json", "recipe.yaml", "adapter/adapter.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "key: [", "\ud800"])
def test_what_is_damaged_is_said(run, file, content):
    (run / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert f"{file.split('/')[-1]} cannot be read" in text_of(run)


def test_damaged_lines_are_counted_and_left_out(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[9], lines[19], lines[29] = "{", "\x00\x00", '"text"'
    del lines[39]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 61, "lo']))
    text = text_of(run)
    for number in (10, 20, 30, 60):
        assert f"line {number} of metrics.jsonl is damaged" in text
    assert "metrics.jsonl goes from step 39 to 41 in line 40" in text


def test_a_run_that_is_not_finished_says_so(run):
    begun = {"run_id": "mine", "finished": False, "starts": [{"step": 0, "world_size": 2}]}
    write_json(run / "run.json", begun)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:20]))
    text = text_of(run)
    assert f"The run is not finished: 20 of {NUM_STEPS} steps are made" in text
    assert "run.json has no timings" in text and "says nothing of the mask" in text


def test_a_run_that_only_selected_a_mask_has_a_map_of_it(run):
    for name in ("adapter", "checkpoints", "eval"):
        shutil.rmtree(run / name)
    mask = Mask({"model.layers.0.q_proj.weight": torch.arange(5)}, {"model.layers.0.q_proj.weight": (8, 8)})
    save_mask(run / "mask.safetensors", mask, {})
    assert "entries of the selected mask" in text_of(run)
    assert (run / "report" / "mask.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_in_an_older_form_are_said_to_be_so(run):
    write_json(run / "eval" / "before.json", {"results": {"arc_easy": {"acc,none": 0.5}}})
    assert "eval/before.json was scored by an older version" in text_of(run)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


def leaves(nested, path=()):
    """Paths to all values of a nested document."""
    items = nested.items() if isinstance(nested, dict) else enumerate(nested)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


def with_value(nested, path, value):
    copy = json.loads(json.dumps(nested))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


@pytest.mark.filterwarnings("ignore:overflow", "ignore:constrained_layout")
@pytest.mark.parametrize("value", [None, "text", [3], {"a": "b"}, 1e308])
def test_wrong_types_in_run_json_crash_nothing(tmp_path, value):
    """At every place of it; of the timings, which are drawn, at one."""
    whole = facts()
    paths = [path for path in leaves(whole) if "per_layer" not in path]
    for path in [path for path in paths if path[0] != "timings_s" or path[-1] in ("timings_s", "total")]:
        shown = {k: v for k, v in whole.items() if k != "timings_s" or path[0] == k}
        write_json(tmp_path / "run.json", with_value(shown, path, value))
        assert to_markdown(report_of(read_run(tmp_path))) and isinstance(summary(tmp_path), list)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:constrained_layout")
@pytest.mark.parametrize("value", [None, "text", [3], {"a": "b"}, 1e308, float("nan")])
def test_wrong_types_in_metrics_crash_nothing(run, value):
    shutil.rmtree(run / "adapter")
    lines = metrics()[:4]
    keys = [*lines[0], "scores", "validation_loss"]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, key: value}) + "\n" for key in keys for line in lines)
    )
    write_report(run)


# What files say is text


EVIL = (
    "<script>alert(1)</script>|`[x](http://e.vil)![y](http://e.vil/z.png)\n"
    "# big *b* &lt; <img src=x onerror=y>"
)


def test_nothing_that_a_file_says_is_markup(tmp_path):
    run = make_run(tmp_path / "a<b>|c`_d_", machine={"device": EVIL, EVIL: EVIL}, versions={EVIL: EVIL})
    scores = [score(EVIL, 0.5, filter=EVIL, metric=EVIL)]
    for label, model in (("before", "base"), ("after", "tuned")):
        document = evaluation(label, model, "main", scores, None, lm_eval=EVIL, mode=EVIL)
        write_json(run / "eval" / f"{label}.json", document)
    write_json(run / "eval" / f"{'x' * 10}<img src=x>.json", {"results": {}})
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}\nodd: {json.dumps(EVIL + '```')}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "scores": {EVIL: 0.5}}) + "\n")
    write_report(run)
    for page in (page_of(run), rendered(run)):
        assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "em", "strong"})
        pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
        assert all(source.startswith(("data:", "report/")) for source in pictures)
        assert not [a for tag, a in page.tags if tag == "a" and "e.vil" in a.get("href", "")]
        assert "<script>alert(1)</script>" in page.text and "&lt;" in page.text


# The table at the end of a run


def test_memory_and_traffic_are_those_of_the_rank_that_held_most(written, finished):
    text = (written / "report.md").read_text(encoding="utf-8")
    section = text.split("## Memory and traffic")[1].split("## ")[0]
    cells = {
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in section.splitlines() if "|" in line
    }
    assert {("process", "512.00 MiB"), ("base shard", "2.00 MiB"), ("delta", "2.93 KiB")} <= cells
    assert ("peak", "514.00 MiB") in cells and not any(kind == "gradient" and v == "0" for kind, v in cells)
    assert {("weights, forward", "5.00 MiB"), ("gradient", "2.00 KiB")} <= cells
    lines = dict(summary(finished))
    assert lines["memory of a rank"].startswith("514.00 MiB (process 512.00 MiB, base shard 2.00 MiB")
    assert lines["sent a step"] == "weights, forward 5.00 MiB, gradient 2.00 KiB"


def test_the_summary_has_scores_and_sizes(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_summary(finished)
    printed = capsys.readouterr().out
    for said in (
        "arc_easy acc before                         │ 41.0% ± 2.2",
        "61.0% ± 2.2  (+20.0 points: better, 6.4 s.e.)",
        "trained entries                             │ 720 of 10,368",
        "2; overlap of the last mask with the first 60.0%",
        "410 (260 of them training)",
    ):
        assert said in printed, said
    size = sum(path.stat().st_size for path in (finished / "adapter").iterdir())
    assert dict(summary(finished))["adapter size"] == f"{size / 2**20:.2f} MiB"
