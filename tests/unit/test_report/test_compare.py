"""Several runs side by side, and runs that differ in their seed alone taken together."""

from pathlib import Path
from statistics import mean, stdev

import pytest

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import Score
from speft_ds.report import write_comparison
from speft_ds.report.compare import default_name
from speft_ds.report.run import read_run
from speft_ds.report.seeds import differing_keys, grouped, mean_of
from unit.commands import speft
from unit.test_report.sample import make_run, metrics, score, write_json
from unit.test_report.test_report import page_of, rendered

KEY = ("arc_easy", "acc", "none")
GAINS = (0.15, 0.17, 0.14)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run by gradient, three by snip with three seeds, one with another density and rate."""
    folder = tmp_path_factory.mktemp("runs")
    snips = [
        make_run(folder / f"snip-{seed}", "mask.salience=snip", gain=gain, seed=seed)
        for seed, gain in enumerate(GAINS)
    ]
    dense = make_run(folder / "dense", "mask.density=0.05", "optimizer.lr=1e-4", gain=0.19)
    return [make_run(folder / "grad"), *snips, dense]


def test_runs_that_differ_in_their_seed_are_one_group(runs):
    groups = grouped([read_run(run) for run in runs])
    assert [group.label for group in groups] == ["grad", "snip-0 (3 seeds)", "dense"]
    assert groups[1].seeds == "0, 1, 2"
    assert differing_keys(groups) == ["mask.salience", "mask.density", "optimizer.lr"]


def test_the_same_recipe_twice_is_not_two_seeds(tmp_path):
    twice = [read_run(make_run(tmp_path / name)) for name in "ab"]
    assert [group.label for group in grouped(twice)] == ["a (2 runs)"]


def test_runs_on_other_bases_are_not_combined(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, base={"fingerprint": "e" * 64})]
    assert len(grouped([read_run(run) for run in runs])) == 2
    write_comparison(runs, tmp_path / "out")
    assert "the runs have different bases" in page_of(tmp_path / "out").text


def test_mean_and_deviation_against_pythons_own():
    values = [0.41 + gain for gain in GAINS]
    pairs = zip(values, (0.02, 0.03, 0.04), strict=True)
    found = mean_of([Score(**score("t", value, error)) for value, error in pairs])
    assert (found.value, found.deviation) == (mean(values), stdev(values))
    assert found.stderr == pytest.approx(0.03) and found.num_runs == 3
    assert found.error == pytest.approx((0.03**2 + stdev(values) ** 2 / 3) ** 0.5)
    assert mean_of([Score(**score("t", 0.5, None))]).error is None
    assert mean_of([]) is None


def test_the_comparison_has_scores_keys_and_costs(runs, tmp_path):
    write_comparison(runs, tmp_path / "out")
    page, markdown = page_of(tmp_path / "out"), rendered(tmp_path / "out")
    values = [0.41 + gain for gain in GAINS]
    cell = f"41.0% → {mean(values):.1%} ± 2.2, sd {100 * stdev(values):.1f} (n=3)"
    assert cell in page.cells and cell in markdown.cells
    text = page.text
    assert "5 runs in 3 groups compared" in text
    assert (
        "On arc_easy acc, grad is first with 61.0% ± 2.2, then dense with 60.0% ± 2.2: 0.3 standard" in text
    )
    assert "so that is no clear order" in text
    at = page.cells.index("mask.salience")
    assert page.cells[at - 1 : at + 6] == [
        "run", "mask.salience", "mask.density", "optimizer.lr", "grad", "gradient", "0.005"
    ]  # fmt: skip
    seconds = [sum(line["step_ms"] for line in metrics(seed)) / 1000 for seed in range(3)]
    assert f"{round(mean(seconds)) // 60} min {round(mean(seconds)) % 60} s" in text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 5


def test_scores_made_in_different_ways_are_not_compared_in_silence(tmp_path):
    runs = [make_run(tmp_path / name, f"seed={number}") for number, name in enumerate("ab")]
    other = (runs[1] / "eval" / "after.json").read_text().replace('"limit": 500', '"limit": 50')
    (runs[1] / "eval" / "after.json").write_text(other)
    write_comparison(runs, tmp_path / "out")
    assert "the runs were scored in different ways" in page_of(tmp_path / "out").text


def test_a_run_with_nothing_in_it_is_compared_too(runs, tmp_path):
    empty = tmp_path / "empty"
    write_json(empty / "run.json", {})
    write_comparison([runs[0], empty], tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert f"{empty}: there is no metrics.jsonl" in text and f"{empty}: the run is not finished" in text
    write_comparison([empty, make_empty(tmp_path / "another")], tmp_path / "both")
    assert "No run was scored after training" in page_of(tmp_path / "both").text


def make_empty(folder):
    write_json(folder / "run.json", {})
    return folder


def test_names_of_the_folder():
    assert default_name([Path("runs/a"), Path("/x/b"), Path("c")]) == "report-a-vs-b-vs-c"
    many = [Path(f"runs/a-run-with-a-name-{n}") for n in range(9)]
    assert default_name(many) == "report-a-run-with-a-name-0-vs-8-others"


def test_a_report_of_several_does_not_hide_that_of_one(runs):
    with pytest.raises(UserError, match="is a run"):
        write_comparison(runs[:2], runs[0])


def test_the_command(runs, tmp_path, monkeypatch):
    """One run into its own folder, several beside the runs, the same one twice as one; problems in words."""
    monkeypatch.chdir(tmp_path)
    one, other = (make_empty(tmp_path / name) for name in ("one", "other"))
    done = speft("report", "one", "one/")
    assert done.returncode == 0 and done.stdout.splitlines() == ["one/report.html", "one/report.md"]
    done = speft("report", "one", "other")
    assert done.stdout.splitlines()[0] == "runs/report-one-vs-other/report.html"
    assert (one / "report.md").is_file() and not (other / "report.md").exists()
    done = speft("report", "nowhere")
    assert done.returncode == 2 and "nowhere is not a run folder" in done.stderr
