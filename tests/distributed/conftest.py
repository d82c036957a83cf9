import os
import sys
from pathlib import Path

import pytest
import yaml
from live import LiveRun
from tiny import recipe_values

from distributed.reference import make_recipe
from speft_ds.env import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tiny, tmp_path):
    """recipe(checkpoint, folder, sections): a short recipe whose run folder is tmp_path/folder."""

    def make(checkpoint="untied", folder="run", **sections):
        return make_recipe(tiny, tmp_path / folder, checkpoint, **sections)

    return make


@pytest.fixture
def values(tiny, tmp_path):
    """The recipe of a test's live runs, as in a file; its run folder is tmp_path/run."""
    return recipe_values(tiny, output_dir=str(tmp_path / "run"))


@pytest.fixture
def write(values, tmp_path):
    """write(): the path of a file with `values` as they are now; a run that was just started may read it."""

    def written():
        (tmp_path / "new").write_text(yaml.safe_dump(values))
        return (tmp_path / "new").replace(tmp_path / "mine.yaml")

    return written


@pytest.fixture
def start(write, tmp_path):
    """start(more arguments, num_ranks, hooks, job, environment): a live run of the recipe, or of another."""
    runs = []

    def begin(*more, num_ranks=2, hooks=None, job="train", recipe=None, **environment):
        arguments = ["--recipe", str(recipe or write()), *more]
        log = tmp_path / f"log{len(runs)}"
        runs.append(LiveRun(log, arguments, num_ranks, hooks, job, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture
def launcher():
    """launcher(job): the command that launches it on two ranks, but for its arguments; its environment."""

    def command(job="train"):
        program = str(Path(sys.executable).with_name("deepspeed"))
        words = [program, "--num_gpus", "2", "--master_port", str(free_port())]
        return [*words, str(ROOT / "launch" / f"{job}.py")], {**os.environ, "DS_ACCELERATOR": "cpu"}

    return command
