"""Several runs side by side, and runs that differ only in their seed taken together."""

from pathlib import Path
from statistics import mean, stdev

import pytest

from speft_ds.errors import UserError
from speft_ds.evaluation.scores import Score
from speft_ds.report.compare import default_name, grouped, mean_score, write_comparison
from speft_ds.report.run import read_run
from unit.commands import speft
from unit.report.reading import page_of, rendered
from unit.report.sample import make_run, metrics, score, write_json

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


@pytest.fixture
def empty(tmp_path):
    """Two run folders with nothing in them."""
    for name in ("one", "other"):
        write_json(tmp_path / name / "run.json", {})
    return tmp_path / "one", tmp_path / "other"


def labels(runs):
    return [group.label for group in grouped([read_run(run) for run in runs])]


def test_runs_that_differ_only_in_their_seed_are_one_group(runs, tmp_path):
    assert labels(runs) == ["grad", "snip-0 (3 seeds)", "dense"]
    again = [make_run(tmp_path / name) for name in "ab"]
    assert labels(again) == ["a (2 runs of 1 seed)"]
    assert labels([*again, make_run(tmp_path / "c", seed=1)]) == ["a (3 runs of 2 seeds)"]


def test_runs_of_one_seed_are_one_seed(tmp_path):
    """They say nothing of how far seeds are apart, and do not count twice in the mean."""
    key = ("arc_easy", "acc", "none")
    again = [read_run(make_run(tmp_path / name, gain=gain)) for name, gain in (("a", 0.1), ("b", 0.3))]
    (group,) = grouped(again)
    found = group.mean_score(key)
    assert found.value == pytest.approx(0.41 + 0.2) and (found.deviation, found.num_seeds) == (None, 1)
    assert found.error == found.stderr and "sd" not in str(found)
    (group,) = grouped([*again, read_run(make_run(tmp_path / "c", gain=0.4, seed=1))])
    found = group.mean_score(key)
    assert found.value == pytest.approx(0.41 + (0.2 + 0.4) / 2) and found.num_seeds == 2
    assert found.deviation == pytest.approx(stdev([0.61, 0.81]))


def test_mean_and_deviation_against_pythons_own():
    values = [0.41 + gain for gain in GAINS]
    pairs = zip(values, (0.02, 0.03, 0.04), strict=True)
    found = mean_score([[Score(**score("t", value, error))] for value, error in pairs])
    assert (found.value, found.deviation, found.num_seeds) == (mean(values), stdev(values), 3)
    assert found.stderr == pytest.approx(0.03)
    assert found.error == pytest.approx((0.03**2 + stdev(values) ** 2 / 3) ** 0.5)
    assert mean_score([[Score(**score("t", 0.5, None))]]).error is None
    assert mean_score([]) is None


def test_the_comparison_has_scores_keys_and_costs(runs, tmp_path):
    write_comparison(runs, tmp_path / "out")
    values = [0.41 + gain for gain in GAINS]
    spread = f"41.0% → {mean(values):.1%} ± 2.2, sd {100 * stdev(values):.1f} (n=3)"
    seconds = round(mean(sum(line["step_ms"] for line in metrics(seed)) for seed in range(3)) / 1000)
    last = [mean(line["loss"] for line in metrics(seed)[-2:]) for seed in range(3)]  # 4% of 60 steps
    for page in (page_of(tmp_path / "out"), rendered(tmp_path / "out")):
        assert page.row("arc_easy acc") == ["41.0% → 61.0% ± 2.2", spread, "41.0% → 60.0% ± 2.2"]
        assert page.row("mask.salience") == ["gradient", "snip", "gradient"]
        differing = [row[0] for row in page.rows if "." in row[0] and "/" not in row[1]]
        assert differing == ["mask.salience", "mask.density", "optimizer.lr"]
        assert page.row("time in steps")[1].startswith(f"{seconds // 60} min {seconds % 60} s")
        assert page.row("training loss")[1] == f"{mean(last):.4g} ({min(last):.4g} to {max(last):.4g})"
        assert len(page.attributes("img", "src")) == 5
        named = page.attributes("img", "alt")[0].partition(": ")[2]
        assert named == "grad, snip-0, snip-1, snip-2, dense"  # the legend: every run has its own line
        # The first two are 1 point apart, each with an error of 2.2.
        assert "0.3 standard errors apart, so that is no clear order" in page.text


def test_what_cannot_be_compared_is_noted(tmp_path):
    """Scores made in different ways, other bases (which are no seeds of one run), other machines."""
    changes = {"base": {"fingerprint": "e" * 64}, "world_size": 1}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, **changes)]
    after = runs[1] / "eval" / "after.json"
    after.write_text(after.read_text().replace('"limit": 500', '"limit": 50'))
    assert labels(runs) == ["a", "b"]
    write_comparison(runs, tmp_path / "out")
    assert len(page_of(tmp_path / "out").attributes("li", "class")) == 3
    write_comparison([runs[0], make_run(tmp_path / "c", seed=1)], tmp_path / "alike")
    assert page_of(tmp_path / "alike").attributes("li", "class") == []


def test_a_run_with_nothing_in_it_is_compared_too(runs, empty, tmp_path):
    write_comparison([runs[0], empty[0]], tmp_path / "out")
    text = page_of(tmp_path / "out").text
    assert f"{empty[0]}: there is no metrics.jsonl" in text and f"{empty[0]}: the run is not finished" in text
    write_comparison(empty, tmp_path / "both")
    assert page_of(tmp_path / "both").row("steps") == ["0", "0"]


def test_the_folder_is_named_after_the_runs_and_is_none_of_them(empty):
    assert default_name([Path("runs/a"), Path("/x/b"), Path("c")]) == "report-a-vs-b-vs-c"
    many = [Path(f"runs/a-run-with-a-name-{n}") for n in range(9)]
    assert default_name(many) == "report-a-run-with-a-name-0-vs-8-others"
    with pytest.raises(UserError) as caught:
        write_comparison(empty, empty[0])
    assert caught.value.where == "--output"


def test_the_command(empty, tmp_path, monkeypatch):
    """One run into its own folder, several beside the runs, each once and in order; problems in words."""
    monkeypatch.chdir(tmp_path)
    done = speft("report", "one", "one/")
    assert done.returncode == 0 and done.stdout.splitlines() == ["one/report.html", "one/report.md"]
    done = speft("report", "other", "one", "./one/../other")
    assert done.stdout.splitlines()[0] == "runs/report-other-vs-one/report.html"
    assert (empty[0] / "report.md").is_file() and not (empty[1] / "report.md").exists()
    done = speft("report", "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr
