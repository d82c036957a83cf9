"""`speft runs` and `speft --version`."""

import fcntl
import json
import os
import re
from pathlib import Path

import pytest

from speft_ds import __version__
from speft_ds.cli.commands.list_runs import find_runs, scores_of_run, state_of
from speft_ds.report.run import read_run
from unit.commands import run, speft
from unit.report.sample import make_run, score, write_json

pytestmark = pytest.mark.usefixtures("own_folder")


def states(*folders):
    return [state_of(read_run(Path(folder))) for folder in folders]


def lines_of(text):
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()[2:] if line.strip()]


def test_every_run_with_recipe_model_state_and_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    make_run(Path("runs/first"), recipe="quickstart")
    make_run(Path("runs/sweep/a/second"), recipe="mine")
    write_json(Path("runs/first/checkpoints/step-1/run.json"), {})  # inside a run
    for path in Path("runs").rglob("*"):
        os.utime(path, (1, 1))
    os.utime("runs/sweep/a/second/metrics.jsonl", (2, 2))
    os.utime("runs/first/eval/after.json", (3, 3))
    (Path("runs/first") / "gone").symlink_to("nowhere")
    assert run(monkeypatch, "runs") == 0
    lines = [cells for cells in lines_of(capsys.readouterr().out) if cells[0].startswith("runs/")]
    rows = {cells[0]: cells[1:] for cells in lines}
    assert list(rows) == ["runs/first", "runs/sweep/a/second"]  # the one that was written to last is first
    scores = "arc_easy acc 41.0% -> 61.0%"
    assert rows == {
        "runs/first": ["quickstart", "name", "finished, 60 steps", scores],
        "runs/sweep/a/second": ["mine", "name", "finished, 60 steps", scores],
    }


def test_how_far_a_run_is(tmp_path):
    going, ended, mask = Path("going"), Path("ended"), Path("mask")
    for folder in (going, ended):
        make_run(folder, finished=False)
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:7]))
    mask.mkdir()
    (mask / "recipe.yaml").write_text("seed: 0")
    (mask / "mask.safetensors").write_text("")
    with (going / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = states(going, ended, mask)
    assert found == ["running, step 7 of 60", "stopped at step 7 of 60", "a mask, not trained"]
    assert states(going) == ["stopped at step 7 of 60"]
    (going / ".lock").unlink()
    os.mkfifo(going / ".lock")  # nobody will ever write to it
    assert states(going) == ["stopped at step 7 of 60"]


def test_scores_of_many_tasks_are_counted(tmp_path):
    folder = make_run(tmp_path / "run")
    document = json.loads((folder / "eval" / "after.json").read_text())
    more = [score(f"task{n}", 0.5) for n in range(9)]
    write_json(folder / "eval" / "after.json", {**document, "scores": more})
    lines = scores_of_run(read_run(folder))
    assert len(lines) == 4 and lines[0] == "task0 acc 50.0%" and "6 more" in lines[-1]


def test_what_files_say_is_text(monkeypatch, capsys):
    make_run(Path("runs/one"), recipe="[red]a\x1b[31m")
    assert run(monkeypatch, "runs") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[red]" in shown


def test_links_that_lead_around_end(tmp_path):
    make_run(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "again").symlink_to(tmp_path)
    found = list(find_runs(tmp_path))
    assert found and len({path.resolve() for path in found}) == 1


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], []])
def test_without_runs(monkeypatch, capsys, words):
    Path("empty").mkdir()
    assert run(monkeypatch, "runs", *words) == 2
    assert "speft" in capsys.readouterr().err


def test_the_version_is_said_without_more():
    done = speft("--version")
    assert (done.returncode, done.stderr) == (0, "") and __version__ in done.stdout
