"""The run folder: whether a run may start in it, who writes to it, and what is in it when one goes on."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from limits import HANG_S

from speft_ds.config.load_recipe import ROOT, load_recipe
from speft_ds.errors import UserError
from speft_ds.training import run_dir
from speft_ds.training.run_dir import (
    Lock,
    check_output_dir,
    copy_scores,
    has_files,
    read_facts,
    rewind_metrics,
    start_folder,
    wait_for_lock,
    write_facts,
)
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


def refusal(recipe):
    with pytest.raises(UserError) as caught:
        check_output_dir(recipe)
    return caught.value


def recipe_in(tmp_path, folder):
    return load(tmp_path, "", f"output_dir={folder}")


# Where a run may start


@pytest.mark.parametrize("folder", ["new", "a/new/one", "empty"])
def test_a_new_or_empty_folder_will_do(tmp_path, folder):
    Path("empty").mkdir()
    check_output_dir(recipe_in(tmp_path, folder))
    assert not Path("a").exists()  # a look changes nothing


def test_what_a_job_puts_there_does_not_matter(tmp_path):
    Path("run").mkdir()
    for name in ("slurm-12.out", "slurm-12_3.err", "submit.sbatch", ".lock"):
        (Path("run") / name).write_text("")
    assert not has_files(Path("run"))
    check_output_dir(recipe_in(tmp_path, "run"))
    (Path("run") / "slurm.txt").write_text("")
    assert has_files(Path("run"))


@pytest.mark.parametrize("name", ["recipe.yaml", "adapter", ".hidden"])
def test_a_used_folder_is_refused(tmp_path, name):
    (Path("run") / "slurm-1.out").mkdir(parents=True)
    (Path("run") / name).mkdir()
    error = refusal(recipe_in(tmp_path, "run"))
    assert error.what == "the run folder run is not empty" and "output_dir=run" in error.where
    assert "output_dir=run-2" in error.fix and "rm -r run" in error.fix and "--resume" not in error.fix


def test_a_run_can_be_gone_on_with(tmp_path):
    recipe = load(tmp_path)
    start_folder(recipe)
    assert refusal(recipe).fix.startswith("go on with the run in it: --resume, or ")


def test_a_file_is_no_run_folder(tmp_path):
    Path("file").write_text("")
    assert refusal(recipe_in(tmp_path, "file")).what == "the run folder file is not empty"
    assert "cannot be written" in refusal(recipe_in(tmp_path, "file/run")).what


@contextmanager
def anybody():
    """This process without the rights of root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000], ids=oct)
@pytest.mark.parametrize("run", ["", "run", "deep/run"])
def test_where_one_may_not_write_no_run_starts(tmp_path, mode, run):
    """In a folder that may only be read, only be listed, or not even be looked into."""
    with tempfile.TemporaryDirectory() as common:
        Path(common).chmod(0o777)
        theirs = Path(common) / "theirs"
        theirs.mkdir(mode)
        recipe = recipe_in(tmp_path, theirs / run)
        with anybody():
            error = refusal(recipe)
    assert error.what.startswith(
        f"the run folder {recipe.output_dir} cannot be written: no right to write to"
    )
    assert error.fix == "output_dir=/a/folder/you/may/write/to"


# What is in it


def test_the_recipe_in_it_is_that_of_the_run(tmp_path):
    recipe = load(tmp_path, "mask: {density: 0.02}", "seed=5")
    start_folder(recipe)
    again = load_recipe("runs/mine/recipe.yaml")
    exclude = {"name"}
    assert again.model_dump(exclude=exclude) == recipe.model_dump(exclude=exclude)
    assert [path.name for path in Path("runs/mine").iterdir()] == ["recipe.yaml"]


def test_facts_come_back_and_are_empty_where_there_are_none(tmp_path):
    assert read_facts(tmp_path) == {}
    write_facts(tmp_path, {"run_id": "a", "finished": False, "starts": [{"step": 0}]})
    assert read_facts(tmp_path) == {"run_id": "a", "finished": False, "starts": [{"step": 0}]}
    (tmp_path / "run.json").write_text('{"run_id": ')
    assert read_facts(tmp_path) == {}


def test_scores_from_before_training_are_taken_over(tmp_path):
    copy_scores(tmp_path / "source", tmp_path / "branch")
    assert not (tmp_path / "branch").exists()
    (tmp_path / "source" / "eval").mkdir(parents=True)
    (tmp_path / "source" / "eval" / "before.json").write_text('{"acc": 1}')
    (tmp_path / "source" / "eval" / "after.json").write_text('{"acc": 2}')
    copy_scores(tmp_path / "source", tmp_path / "branch")
    assert [path.name for path in (tmp_path / "branch" / "eval").iterdir()] == ["before.json"]


# Metrics


def lines(*steps):
    return [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps]


def rewound(folder, step, source=None):
    rewind_metrics(folder, step, source)
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("step", [0, 1, 3, 5])
@pytest.mark.parametrize("end", ["", '{"step": 6, "lo', '{"step": 6}', "\n", '[6]\n{"step": 7}\n'])
def test_the_lines_after_a_step_are_removed(tmp_path, step, end):
    (tmp_path / "metrics.jsonl").write_text("".join(lines(1, 2, 3, 4, 5)) + end)
    assert rewound(tmp_path, step) == lines(1, 2, 3, 4, 5)[:step]
    assert rewound(tmp_path, step) == lines(1, 2, 3, 4, 5)[:step]


# What is in the file, of which the first three steps are wanted.
LACKING = {
    "a step is missing": "".join(lines(1, 3, 4)),
    "the first is missing": "".join(lines(2, 3)),
    "a step is there twice": "".join(lines(1, 2, 2, 3)),
    "the steps are not in order": "".join(lines(2, 1, 3)),
    "it ends before": "".join(lines(1, 2)),
    "the last line was cut off": "".join(lines(1, 2, 3))[:-1],
    "a line was cut off within": "".join(lines(1)) + '{"step": 2, "lo\n' + "".join(lines(3)),
    "it is empty": "",
}


@pytest.mark.parametrize("name", LACKING)
def test_a_step_that_has_no_line_of_its_own_is_told(tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text(LACKING[name])
    with pytest.raises(UserError) as caught:
        rewind_metrics(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    assert (caught.value.what, caught.value.where) == (f"{path} lacks lines of the first 3 steps", str(path))
    assert path.read_text() == LACKING[name]  # it stays, for those who want to look


def test_without_metrics_a_run_goes_on_only_from_the_beginning(tmp_path):
    with pytest.raises(UserError, match="lacks lines of the first 1 steps"):
        rewind_metrics(tmp_path, 1)
    assert rewound(tmp_path, 0) == []


def test_a_branch_takes_the_lines_of_the_run_that_it_is_of(tmp_path):
    source, branch = tmp_path / "source", tmp_path / "branch"
    source.mkdir()
    (source / "metrics.jsonl").write_text("".join(lines(1, 2, 3)))
    assert rewound(branch, 2, source) == lines(1, 2)
    assert (source / "metrics.jsonl").read_text() == "".join(lines(1, 2, 3))


# One run writes to it at a time, and whoever dies lets go of it

HOLD = """
import sys, time
from pathlib import Path
from speft_ds.training.run_dir import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes to the folder tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_two_runs_do_not_write_to_one_folder(tmp_path, holder, monkeypatch, capsys, take):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.2)
    with pytest.raises(UserError) as caught:
        take(tmp_path / "run")
    assert caught.value.what == f"another run is writing to {tmp_path / 'run'}"
    assert caught.value.where == str(tmp_path / "run" / ".lock")
    assert capsys.readouterr().out == f"{caught.value.what}: waiting for its end\n"  # once


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_a_killed_run_holds_nothing(tmp_path, holder, take):
    holder.kill()
    holder.wait()
    take(tmp_path / "run")


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_a_run_that_is_just_ending_is_waited_for(tmp_path, holder, monkeypatch, capsys, take):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", HANG_S)
    monkeypatch.setenv("RANK", "1")  # only rank 0 speaks
    threading.Timer(0.3, holder.kill).start()
    take(tmp_path / "run")
    assert holder.wait() == -9 and capsys.readouterr().out == ""


def test_those_who_wait_do_not_hinder_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.2)
    wait_for_lock(tmp_path / "run")  # of a folder that is not there
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # a rank that looks at the same time
        wait_for_lock(tmp_path / "run")
    lock = Lock(tmp_path / "run")  # and nobody keeps what they took
    with pytest.raises(UserError, match="another run is writing"):
        Lock(tmp_path / "run")
    lock.file.close()
    Lock(tmp_path / "run")


# What others put there


@pytest.mark.parametrize("take", [Lock, wait_for_lock])
def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path, take):
    (tmp_path / "run").mkdir()
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    for target in (notes, tmp_path / "nowhere", "/dev/zero"):
        (tmp_path / "run" / ".lock").symlink_to(target)
        with pytest.raises(UserError) as caught:
            take(tmp_path / "run")
        assert str(tmp_path / "run" / ".lock") in caught.value.fix
        (tmp_path / "run" / ".lock").unlink()
    assert notes.read_text() == "mine\n" and not (tmp_path / "nowhere").exists()
    os.mkfifo(tmp_path / "run" / ".lock")  # nobody writes to it
    with pytest.raises(UserError):
        take(tmp_path / "run")


def test_what_is_in_a_lock_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("a note\n")
    Lock(tmp_path / "run").file.close()
    wait_for_lock(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == "a note\n"


@pytest.mark.parametrize("link", ["run", "runs"])
def test_a_dangling_link_is_refused_at_the_start(tmp_path, link):
    (tmp_path / link).symlink_to(tmp_path / "gone" / "folder")
    recipe = load(tmp_path, "", f"output_dir={tmp_path / link}{'/a' if link == 'runs' else ''}")
    with pytest.raises(UserError) as caught:
        check_output_dir(recipe)
    assert caught.value.where.startswith("command line") and f"rm {tmp_path / link}" in caught.value.fix
    (tmp_path / "gone" / "folder").mkdir(parents=True)
    check_output_dir(recipe)  # a link to a folder is fine


def test_a_folder_with_a_space_is_quoted(tmp_path):
    folder = tmp_path / "my run #1"
    folder.mkdir()
    (folder / "x").touch()
    with pytest.raises(UserError) as caught:
        check_output_dir(load(tmp_path, "", f'output_dir="{folder}"'))
    words = shlex.split(caught.value.fix.partition("remove this one: ")[2])
    assert words == ["rm", "-r", str(folder)]
    typed = shlex.split(caught.value.fix.partition("choose another, ")[2].partition(", or")[0])
    assert load(tmp_path, "", *typed).output_dir == f"{folder}-2"


@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 100_000, '{"a": "\\ud800"}', "\xff"])
def test_damaged_facts_are_none(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    assert read_facts(tmp_path) == {}
