"""`speft tune`: what is refused before anything runs, and what a run that tells nothing leads to."""

import json

import pytest
import yaml

from speft_ds.cli.commands import tune
from unit.commands import run
from unit.written import write_inputs


@pytest.fixture
def refused(own_folder, tmp_path, monkeypatch, capsys):
    """refused(*words): the fix that `speft tune mine.yaml` offers, which runs nothing."""
    write_inputs(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def typed(*words):
        assert run(monkeypatch, "tune", "mine.yaml", *words) == 2
        assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/trial*/*"))
        return capsys.readouterr().err.partition("fix:")[2]

    return typed


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "--search"),
        (["--lr", "--search"], "--search"),
        (["--lr", "--over", "mask.density=0.1..0.2"], "--search"),
        (["--search", "train.epochs=1"], "train.steps="),
        (["--search", "train.steps=4"], "eval.validation="),
        (
            ["--search", "train.steps=4", "eval.validation=v.jsonl", "--over", "mask.densty=1,2"],
            "mask.density",
        ),
        (["--search", "train.steps=4", "eval.validation=v.jsonl"], "eval.validation="),
    ],
)
def test_what_is_refused_before_anything_runs(refused, words, fix):
    assert fix in refused(*words)


def test_losses_that_do_not_fall_give_no_rate(refused, tmp_path, monkeypatch):
    def launch(job, words, *_):
        given = dict(word.split("=", 1) for word in words if "=" in word)
        assert given["optimizer.schedule"] == "range_test" and given["optimizer.lr"] == "3"
        folder = tmp_path / given["output_dir"]
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump({}))
        lines = [{"step": n, "lr": 10.0 ** (n / 4 - 5), "loss": 2.0 + n % 2} for n in range(1, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    monkeypatch.setattr(tune, "launch", launch)
    assert "optimizer.lr=10" in refused("--lr", "optimizer.lr=3")
    assert not (tmp_path / "runs" / "mine-lr" / "lr.json").exists()
