"""The report of one run: its numbers, what it says where something is missing, that files inject nothing."""

import json
import shlex
import shutil

import pytest
import torch
import yaml

from speft_ds.errors import UserError
from speft_ds.report.page import context_of, head, write_report
from speft_ds.report.render import render
from speft_ds.report.run import read_run
from speft_ds.report.summary import STAGES, WITHIN, key_figures, print_summary, seconds_by_stage
from speft_ds.sparse.mask import Mask, save_mask
from unit.report.reading import page_of, rendered
from unit.report.sample import NUM_STEPS, evaluation, facts, make_run, metrics, score, write_json


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
    write_metrics(copy, [{"step": line["step"], "loss": line["loss"]} for line in metrics()])
    return copy


def write_metrics(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(run):
    write_report(run)
    assert rendered(run).rows
    return page_of(run).text


def test_the_verdict_is_computed_from_the_numbers(written):
    text, at = page_of(written).text, 0
    for fact in (
        f"{NUM_STEPS} of {NUM_STEPS}",
        *("json_task exact_match (strict-match)", "0.0%", "99.2%", "+99.2 points", "248 standard errors"),
        *("arc_easy acc", "41.0%", "61.0%", "+20.0 points", "6.4 standard errors"),
        *("wikitext bits_per_byte", "0.9", "0.95", "+0.05", "3.5 standard errors"),  # worse
        *("winogrande acc", "52.0%", "52.5%", "+0.5 points", "0.3 standard errors"),  # neither
        *("arc_easy acc", "4-shot, 47.0%", "4.5 standard errors"),  # against the best prompt by hand
        *("piqa acc", "68.0%", "61.0%", "-7.0 points"),  # forgotten
        *("perplexity", "15", "15.6", "+4.0%"),
    ):
        at = text.index(fact, at) + len(fact)
    validation = {line["step"]: line["validation_loss"] for line in metrics() if "validation_loss" in line}
    lowest = min(validation, key=validation.get)
    assert f"step {lowest} ({validation[lowest]:.4g})" in text[at:]


def test_tables_have_the_numbers_of_the_files(written, finished):
    page, lines = page_of(written), metrics()
    before_and_after = ["500", "41.0% ± 2.2", "61.0% ± 2.2", "+20.0 points ± 3.1", "better, 6.4 s.e."]
    by_prompt = [f"{value} ± 2.2" for value in ("41.0%", "43.0%", "47.0%", "46.0%", "61.0%")]
    seconds = [line["step_ms"] / 1000 for line in lines]
    size = sum(path.stat().st_size for path in (finished / "adapter").iterdir())
    for name, cells in {
        "arc_easy acc_norm": ["500", "44.0% ± 2.2", "64.0% ± 2.2", *before_and_after[3:]],
        "piqa acc": ["500", "68.0% ± 1.1", "61.0% ± 1.1", "-7.0 points ± 1.6", "worse, 4.5 s.e."],
        "token perplexity (lower is better)": ["15", "15.6", "+4.0%"],
        "arc_easy acc, base": ["3", "37.0%", "41.0%", "43.0%", "6.0 points"],  # of the formats
        "arc_easy acc, tuned": ["3", "59.0%", "61.0%", "62.0%", "3.0 points"],
        "40": ["50", "50", "0.6"],  # a change of the mask
        "trained entries": ["720 of 10,368 (6.9444%)"],
        "columns with entries": ["150 of 432 (34.7%)"],
        "of the dense weight gradient's multiply-adds": ["32.1%"],
        "kernels chosen by": ["measured costs"],
        "tokens/s, without the first 3 steps": [
            f"{int(sum(line['num_tokens'] for line in lines[3:]) / sum(seconds[3:])):,}"
        ],
        "all steps, over all starts": [f"{round(sum(seconds)) // 60} min {round(sum(seconds)) % 60} s"],
        "adapter": [f"{size / 1024:.2f} KiB"],
        # Of the rank with the highest peak.
        "base shard": ["2.00 MiB"],
        "peak": ["514.00 MiB"],
        "gradient": ["2.00 KiB"],  # sent; no memory is of this kind
    }.items():
        assert page.row(name) == cells, name
    assert page.row("arc_easy acc") == before_and_after and page.row("arc_easy acc", 2) == by_prompt
    assert {value for value in page.attributes("td", "class") if value} == {"better", "worse"}
    for how in ("lm_eval 0.4.13", "limit 500", "arc_easy 1.0", "20,000 tokens", "after step 20", ": 30."):
        assert how in page.text, how


def test_the_head_says_what_was_run_on_what_and_nothing_of_the_machines_folders(tmp_path):
    base = {"name_or_path": "/home/me/models/llama", "stored": "bfloat16, 2 weights in nf4 of 4.50 bits each"}
    data = {"path": "~/private/rows.jsonl"}
    run = make_run(tmp_path / "run", base=base)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **data}}))
    found = dict(head(read_run(run)))
    assert found == {
        "model": "llama",
        "base format": "bfloat16, 2 weights in nf4 of 4.50 bits each",
        "data": "rows.jsonl, 1,000 rows",
        "recipe": "mine",
        "date": "2026-01-02 03:04 UTC; again 2026-01-03 03:04 UTC",
        "machine": "AMD EPYC, 2 cores, 2 rank(s)",
        "command line": "launch/train.py --recipe mine data.path=.../rows.jsonl 'x=a b'",
        "commit": "abc-dirty (speft_ds)",
    }
    write_report(run)
    assert found.items() <= dict(page_of(run).pairs).items()
    assert all(f"{what}: {which}" in rendered(run).text for what, which in found.items())
    assert rendered(run).text.count("commit: abc-dirty") == 1


def test_answers_that_became_right_and_wrong_are_shown(written):
    page, markdown = page_of(written), rendered(written)
    for found in (page, markdown):
        assert ["json_task exact_match (strict-match)", "3", "1", "1", "1"] in found.rows
        at = 0
        for number in ("0: became right", "1: became wrong", "2: stayed wrong"):
            at = found.text.index(f"document {number}", at)
            for text in ("question", "target", "base says", "tuned says"):
                at = found.text.index(f"{text} {number[0]}", at)
    assert ["before", "base says 0"] in page.pairs and ["after", "tuned says 0"] in page.pairs


def test_the_main_hyperparameters_are_a_table(written, finished):
    page, recipe = page_of(written), yaml.safe_load((finished / "recipe.yaml").read_text())
    for what, value in {
        "learning rate": recipe["optimizer"]["lr"],
        "density": recipe["mask"]["density"],
        "rows per step": recipe["train"]["global_batch"],
        "steps": NUM_STEPS,
        "seed": 0,
    }.items():
        assert page.row(what) == [f"{value:,}"], what
    names = [row[0] for row in page.rows]
    assert "layer gate" not in names  # switched off


def test_no_rest_without_a_name_is_large_where_all_stages_are_known(finished):
    """The parts of training follow it and count once."""
    run = read_run(finished)
    shown = seconds_by_stage(run, min_share=0.0)
    names, inside = list(shown), [STAGES[stage] for stage in WITHIN if STAGES[stage] in shown]
    at = names.index("training")
    assert names[at + 1 : at + 3] == inside == ["training: validation loss", "training: checkpoints"]
    total = sum(seconds for name, seconds in shown.items() if name not in inside)
    assert total == pytest.approx(run.fact("timings_s.total", 0)) and shown["all else"] < 0.02 * total


def test_page_and_markdown_have_the_same_cells_and_pictures(written):
    page, markdown = page_of(written), rendered(written)
    shown = [cell for row in page.rows for cell in row if cell.strip()]
    rest = iter([cell for row in markdown.rows for cell in row])  # the figures are a table there, too
    assert all(cell in rest for cell in shown) and len(shown) > 150
    sources = markdown.attributes("img", "src")
    assert all((written / source).stat().st_size > 500 for source in sources)
    assert len(sources) == len(page.attributes("img", "src")) == 8


def test_the_report_is_a_function_of_the_folder(finished, written, tmp_path):
    before = sorted(finished.rglob("*"))
    files = [tmp_path / "out" / name for name in ("report.html", "report.md")]
    assert write_report(finished, tmp_path / "out") == files
    names = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    assert all((tmp_path / "out" / name).read_bytes() == (written / name).read_bytes() for name in names)
    assert not list(written.rglob("*.tmp")) and sorted(finished.rglob("*")) == before


def test_the_page_needs_nothing_else(written):
    for tag, attributes in page_of(written).tags:
        assert tag not in ("script", "iframe", "object", "video", "form")
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("data:", "#")), (tag, address)
        assert not any(name.startswith("on") for name in attributes)


def test_the_table_at_the_end_has_scores_and_sizes(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_summary(finished)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    figures = {what: (number, how) for what, number, how in key_figures(read_run(finished))}
    assert all([what, *cells] in rows for what, cells in figures.items())
    assert figures["arc_easy acc"][0] == "61.0%" and "+20.0 points ± 3.1" in figures["arc_easy acc"][1]
    assert figures["trained entries"][0] == "720" and "60.0%" in figures["mask changes"][1]
    number, how = figures["training rows"]
    assert number == "1,000" and all(
        text in how for text in ("1,050", "30 empty", "20 too long", "0.96 epochs")
    )
    assert {"trainable state per rank", "gradients sent per rank and step"} <= figures.keys()
    assert figures["peak memory per rank"][0] == "514.00 MiB" and figures["total time"][0] == "6 min 50 s"
    assert figures["- training"] == ("4 min 20 s", "63%") and "- selecting the mask" not in figures


def test_what_happened_in_scoring_is_in_the_table_and_in_the_report(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for label in ("before", "after"):
        document = json.loads((run / "eval" / f"{label}.json").read_text())
        write_json(run / "eval" / f"{label}.json", {**document, "notes": ["arc_easy: 3 of 9 were cut"]})
    print_summary(run)
    assert capsys.readouterr().out.count("arc_easy: 3 of 9 were cut") == 1
    write_report(run)
    assert len(page_of(run).attributes("li", "class")) == 1
    assert "after, before: arc_easy: 3 of 9 were cut" in page_of(run).text


# What is missing or damaged


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("run.json", "there is no run.json"),
        ("recipe.yaml", "there is no recipe.yaml"),
        ("metrics.jsonl", "there is no metrics.jsonl"),
        ("eval", "eval.tasks"),
        ("adapter", "no adapter and no mask"),
        ("adapter/adapter.json", "there is no adapter.json"),
        ("adapter/adapter.safetensors", "no heat map"),
        ("checkpoints", "none kept"),
        ("eval/before.json", "only after training"),
        ("eval/after.json", "only before training"),
        ("checkpoints/step_000040/COMPLETE", "step_000040 does not count"),
    ],
)
def test_what_is_missing_is_said(run, missing, said):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in text_of(run)


@pytest.mark.parametrize("file", ["run.json", "recipe.yaml", "adapter/adapter.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "key: [", "\ud800", "[" * 10_000])
def test_what_is_damaged_is_said(run, file, content):
    (run / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert f"{file.split('/')[-1]} cannot be read" in text_of(run)


def test_damaged_lines_are_counted_and_left_out(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[9], lines[19], lines[29] = "{", "\x00\x00", '"text"'
    del lines[39]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 61, "lo']))
    text = text_of(run)
    assert all(f"line {number} of metrics.jsonl" in text for number in (10, 20, 30, 60))
    assert "from step 39 to 41 in line 40" in text


def test_a_run_that_is_not_finished_says_so(run):
    write_json(run / "run.json", {"finished": False, "starts": [{"step": 0, "world_size": 2}]})
    write_metrics(run, metrics()[:20])
    text = text_of(run)
    assert "not finished" in text and f"20 of {NUM_STEPS} steps" in text and "--ranks 2" in text
    assert "no timings" in text and "nothing about the mask" in text


def test_a_run_that_only_selected_a_mask_has_a_map_of_it(run):
    shutil.rmtree(run / "adapter")
    mask = Mask({"model.layers.0.q_proj.weight": torch.arange(5)}, {"model.layers.0.q_proj.weight": (8, 8)})
    save_mask(run / "mask.safetensors", mask, {})
    assert "selected mask" in text_of(run) and (run / "report" / "mask.svg").is_file()


def test_what_cannot_be_reported_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    for folder, output in ((tmp_path, None), (tmp_path / "nowhere", None), (run, tmp_path / "file")):
        with pytest.raises(UserError) as caught:
            write_report(folder, output)
        assert caught.value.where == str(output or folder) and caught.value.fix


WRONG = [None, "text", [3], {"a": "b"}, 1e308, pytest.param(10**400, id="beyond floats")]


def leaves(nested, path=()):
    """Paths to all values of a nested document."""
    items = nested.items() if isinstance(nested, dict) else enumerate(nested)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:constrained_layout")
@pytest.mark.parametrize("value", WRONG)
def test_wrong_types_in_run_json_crash_nothing(tmp_path, value):
    """At every place of it; of the timings, which are drawn, at one."""
    for path in leaves(facts()):
        if path[0] == "timings_s" and path[-1] not in ("timings_s", "total"):
            continue
        document = at = facts() if path[0] == "timings_s" else facts(timings_s={})
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        write_json(tmp_path / "run.json", document)
        found = read_run(tmp_path)
        assert render("report.md", "run", **context_of(found)) and isinstance(key_figures(found), list)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:constrained_layout")
@pytest.mark.parametrize("value", [*WRONG, float("nan")])
def test_wrong_types_in_metrics_crash_nothing(run, value):
    shutil.rmtree(run / "adapter")
    lines = metrics()[:4]
    keys = [*lines[0], "scores", "validation_loss"]
    write_metrics(run, [{**line, key: value} for key in keys for line in lines])
    write_report(run)


# What files say is text


EVIL = (
    "<script>alert(1)</script>|`[x](http://e.vil)![y](http://e.vil/z.png)\n"
    "# big *b* &lt; <img src=x onerror=y>{{ 7 * 7 }}{% raw %}\x1b[31m-->"
)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_nothing_that_a_file_says_is_markup(tmp_path, capsys):
    start = {"step": 0, "date": EVIL, "command": shlex.quote(EVIL), "commits": {EVIL: EVIL}}
    machine = {"device": EVIL, EVIL: EVIL, "cpu": EVIL}
    run = make_run(tmp_path / "a<b>|c`_d_", machine=machine, versions={EVIL: EVIL}, starts=[start] * 2)
    scores = [score(EVIL, 0.5, filter=EVIL, metric=EVIL), score("quiz", 0.5)]
    for label, model in (("before", "base"), ("after", "tuned")):
        document = evaluation(label, model, "main", scores, None, lm_eval=EVIL, mode=EVIL)
        write_json(run / "eval" / f"{label}.json", document)
        texts = {"target": EVIL, "arguments": [[EVIL, {}]], "resps": [[EVIL]]}
        write_json(run / "eval" / label / "quiz.jsonl", {"doc_id": 0, "acc": 0, **texts})
    write_json(run / "eval" / f"{'x' * 10}<img src=x>.json", {"results": {}})
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}\nodd: {json.dumps(EVIL + '```')}\n")
    write_metrics(run, [{"step": 1, "loss": 1.0, "scores": {EVIL: 0.5}}])
    write_report(run)
    for page in (page_of(run), rendered(run)):
        assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "em", "strong"})
        assert all(source.startswith(("data:", "report/")) for source in page.attributes("img", "src"))
        assert not [address for address in page.attributes("a", "href") if "e.vil" in address]
        for text in ("<script>alert(1)</script>", "&lt;", "{{ 7 * 7 }}{% raw %}"):
            assert text in page.text
        assert "quiz acc, document 0" in page.text and "\x1b" not in page.text
    print_summary(run)
    assert "\x1b[31m" not in capsys.readouterr().out


def test_stashed_activations_have_their_formats_bytes_and_losses(run):
    saved = {"activations": 64 * 2**20, "packed": 9 * 2**20, "others": 2**19}
    lines = [{"step": n, "loss": 3.0 - n / 20, "stash": "bfp4" if n <= 40 else "bfp6"} for n in range(1, 61)]
    lines[44]["loss"] = None  # a step that was skipped
    write_metrics(run, lines)
    write_json(run / "run.json", facts(resources=[{"saved": {}}, {"saved": saved}, 3, {"saved": [1]}]))
    write_report(run)
    for page in (page_of(run), rendered(run)):
        assert page.row("bfp4") == ["1", "40", "2.725", "1.225"]
        assert [*map(float, page.row("bfp6"))] == pytest.approx(
            [41, 60, 3 - 46.1 / 20 + 0.03, 0.225], abs=0.03
        )
        assert page.row("activations, as they are") == ["64.00 MiB"]
        assert page.row("the same, packed") == ["9.00 MiB"] and page.row("packed to") == ["14.1%"]
    write_metrics(run, [{"step": 1, "loss": 2.0}])
    assert "bfp4" not in text_of(run)
