"""The table and the page of synthetic runs, and what a study's folder keeps of them."""

import json
import math
import shutil
from statistics import mean, stdev

import pytest

from speft_ds.errors import UserError
from speft_ds.study.page import Summary, publish
from speft_ds.study.results import failed, open_study, write_study
from unit.report.reading import page_of, rendered
from unit.report.sample import evaluation, facts, score, write_json
from unit.saved import quick_disk

LOSSES = {"gradient": (2.0, 2.1, 2.3), "random": (2.5, 2.4, 2.9)}


@pytest.fixture(autouse=True)
def no_waiting():
    with quick_disk():
        yield


def finish(execution, run, loss, accuracy=0.5, base="f" * 64):
    """The folder of a run as it is at the end, with these scores."""
    folder = execution.folder_of(run)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter.safetensors").write_bytes(bytes(2048))
    steps = ({"step": n, "loss": 3.0, "step_ms": 2000.0, "validation_loss": loss + 2 - n} for n in (1, 2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    mask = {"num_trainable": round(1e6 * run.recipe.mask.density)}
    write_json(folder / "run.json", facts(base={"fingerprint": base}, mask=mask))
    for label, model, value, ppl in (("before", "base", 0.4, 10.0), ("after", "tuned", accuracy, 11.0)):
        scores = [score("sst2", value), score("piqa", 0.6, role="forgetting")]
        text = {"text": "t", "num_tokens": 9, "token_perplexity": ppl, "byte_perplexity": 2.0}
        write_json(folder / "eval" / f"{label}.json", evaluation(label, model, "main", scores, text))


def finish_all(execution):
    for run in execution.needed():
        finish(execution, run, LOSSES[run.setting.variant][run.recipe.seed - 1] - run.recipe.mask.density)
    execution.collect()
    return execution


def to_two_digits(value, error, sign=""):
    """As many decimals as two digits of the error have."""
    decimals = len(f"{error:.2g}".partition(".")[2])
    return f"{value:{sign}.{decimals}f} ± {error:.2g}"


def test_means_differences_and_costs(execution):
    made = finish_all(execution())
    publish(made)
    for page in (page_of(made.folder), rendered(made.folder)):
        for variant, losses in LOSSES.items():
            row = page.row(f"{variant}, mask.density=0.1")
            error = stdev(losses) / math.sqrt(3)
            assert row[:2] == [to_two_digits(mean(losses) - 0.1, error), "3 of 3"]
        pairs = [a - b for a, b in zip(*LOSSES.values(), strict=True)]
        expected = to_two_digits(mean(pairs), stdev(pairs) / math.sqrt(3), "+")
        assert page.row("gradient, mask.density=0.1")[2:] == [expected, "yes"]
        assert page.row("random, mask.density=0.1")[2:] == ["-", "-"]
        scores = page.row("gradient, mask.density=0.1", 1)
        assert scores[1] == "50.0% ± 0.0 (+10.0 points)" and scores[3] == "60.0% ± 0.0 (+0.0 points)"
        assert scores[2] == f"{math.log(11):.4g} ± 0 ({math.log(1.1):+.4g})"
        assert page.row("random, mask.density=0.01", 2)[::3] == ["10,000", "2.00 KiB"]
        assert page.row("random, mask.density=0.01", 2)[1] == "4 s"
        assert len(page.attributes("img", "src")) == 1  # score over trained elements: one rate
    assert Summary(made).notes() == []


def test_the_best_rate_and_its_plateau(execution):
    """A parabola over the logarithm of the rate; the sweep goes on from the edge to what was finished."""
    made = execution(axes=None, rates={"start": [1e-3, 3e-3]}, reference="gradient")
    best = {"gradient": 3e-3, "random": 2.7e-2}
    while todo := made.needed():
        for run in todo:
            distance = math.log(run.rate / best[run.setting.variant], 3)
            finish(made, run, 2 + 0.02 * distance**2 + 0.001 * run.recipe.seed)
        made.collect()
    publish(made)
    page = page_of(made.folder)
    # 1% of 2.001 above the best: 0.02 at the neighbours is reached, but not more.
    assert page.row("gradient")[-2:] == ["0.003", f">= x9 ({1e-3:.2g} to {9e-3:.2g})"]
    assert page.row("random")[4] == "0.027" and page.row("random")[5].startswith(">= x9 (0.009 ")
    assert page.attributes("img", "alt")[0].startswith("validation_loss over learning rate")
    assert len(made.results) == (3 + 2) + (5 + 2)


def test_a_rate_whose_run_failed_counts_as_tried(execution):
    """The best one is not at the edge then, and the plateau ends before it."""
    made = execution(axes=None, rates={"start": [1e-3, 3e-3]}, reference="gradient")
    while todo := made.needed():
        for run in todo:
            if run.rate > 3e-3:
                made.folder_of(run).mkdir(parents=True)
                made.results[run.key] = failed(run, made.folder_of(run))
            else:
                finish(made, run, 2 - 100 * run.rate)
        made.collect()
    summary = Summary(made)
    assert all(row.progress.best_rate == 3e-3 and not row.is_at_edge for row in summary.rows)
    assert all(not str(row[-1]).startswith(">=") for row in summary.main_table()[1])


def test_failed_and_missing_runs_are_named(execution):
    made = execution()
    runs = made.needed()
    for run in runs[2:]:
        finish(made, run, 2.0 + run.recipe.seed)
    made.collect()
    (made.folder_of(runs[0])).mkdir(parents=True)
    (made.folder_of(runs[0]) / "study.log").write_text("step 1\nCUDA out of memory\n")
    made.results[runs[0].key] = failed(runs[0], made.folder_of(runs[0]))
    publish(made)
    page = page_of(made.folder)
    assert page.row(runs[0].name) == ["failed", "step 1\nCUDA out of memory"]
    assert page.row(runs[1].name) == ["not finished", "-"]
    assert page.row("gradient, mask.density=0.01")[1] == "1 of 3"
    assert len(page.attributes("ul", "class")) == 1 and "gradient, mask.density=0.01" in page.text
    assert len(Summary(made).left_out()) == 2


def test_without_seeds_there_is_no_spread(execution):
    made = execution(seeds=None)
    for run in made.needed():
        finish(made, run, 2.0)
    made.collect()
    publish(made)
    assert page_of(made.folder).row("gradient, mask.density=0.01") == ["2", "1 of 1", "+0", "-"]
    assert len(Summary(made).notes()) == 1


def test_nothing_is_finished(execution):
    made = execution()
    publish(made)
    assert page_of(made.folder).row("gradient, mask.density=0.01")[:2] == ["-", "0 of 3"]


def test_different_bases_are_refused(execution):
    made = execution()
    for run in made.needed():
        finish(made, run, 2.0, base=run.setting.variant)
    made.collect()
    with pytest.raises(UserError) as caught:
        publish(made)
    assert str(made.folder) in caught.value.where and not (made.folder / "report.html").exists()


def test_a_task_score_is_better_where_it_is_higher(execution):
    made = execution(metric="sst2/acc", set={"eval.tasks": ["sst2"]})
    for run in made.needed():
        finish(made, run, 2.0, accuracy=0.9 if run.setting.variant == "random" else 0.8)
    made.collect()
    assert [label.partition(",")[0] for label, _ in Summary(made).ranked] == 2 * ["random"] + 2 * ["gradient"]


def test_results_are_read_without_the_runs(execution):
    made = finish_all(execution())
    study, first = made.grid.study, made.grid.first_runs()
    write_study(made.folder, study, first, made.results.values())
    shutil.rmtree(made.folder / "runs")
    assert open_study(made.folder, study, first) == made.results


def test_the_folder_of_another_study_is_refused(execution):
    made = finish_all(execution())
    write_study(made.folder, made.grid.study, made.grid.first_runs(), made.results.values())
    more = execution(seeds=[1, 2, 3, 4])  # this one goes on with what is there
    assert open_study(made.folder, more.grid.study, more.grid.first_runs()) == made.results
    other = execution(set={"eval.validation": "rows.jsonl", "train.steps": 7})
    with pytest.raises(UserError) as caught:
        open_study(made.folder, other.grid.study, other.grid.first_runs())
    assert caught.value.where == "--output" and "set" in caught.value.what
    (made.folder / "study.json").write_text('{"study": 3}')
    with pytest.raises(UserError):
        open_study(made.folder, made.grid.study, made.grid.first_runs())
    (made.folder / "study.json").unlink()
    with pytest.raises(UserError):
        open_study(made.folder, made.grid.study, made.grid.first_runs())
