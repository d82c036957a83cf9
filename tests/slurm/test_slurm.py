"""Runs on a real Slurm that is disturbed in every way it has: they end as an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import recipe_values

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "launch" / "slurm"
STEPS = 16
URGENT = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
ENV = {"SPEFT_ROOT": ROOT, "SPEFT_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    values = recipe_values(tiny, train={"steps": STEPS, "micro_batch": 1, "checkpoint_every": 3})
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Run:
    """A run folder, and the job that works on it."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder, self.job = cluster, folder, None

    def start(self, recipe, *options, script="train"):
        words = [*options, SCRIPTS / f"{script}.sbatch", recipe, f"output_dir={self.folder}"]
        self.job = self.cluster.submit(*words, folder=self.folder.parent, **ENV)
        return self

    @property
    def log(self):
        return self.folder / f"slurm-{self.job}.out"

    def hold(self, restart):
        """Wait until a start of the job is in training, and have its ranks pause there.

        Slurm's own signals bring the SIGCONT along that lets them go on: however fast this machine is, a run
        does not end before it is disturbed.
        """

        def is_training():
            log = self.log.read_text() if self.log.is_file() else ""
            return "\nstep " in log.partition(f"restart {restart}\n")[2]

        self.cluster.wait_during(self.job, is_training, f"it trained after {restart} restarts")
        for rank in self.cluster.ranks(self.job).values():
            os.kill(rank, signal.SIGSTOP)

    def end(self):
        return self.cluster.wait_for_end(self.job)

    def result(self):
        """What must be the same however a run was disturbed."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        adapter = (self.folder / "adapter" / "adapter.safetensors").read_bytes()
        return adapter, [(line["loss"], line["grad_norm"], line["num_tokens"]) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe, tmp_path_factory):
    """The result of a run on 2 nodes with a rank each."""
    run = Run(cluster, tmp_path_factory.mktemp("undisturbed") / "run").start(recipe, "--nodes=2")
    assert run.end() == ("COMPLETED", "0:0", 0), run.log.read_text()
    return run.result()


def test_preempted_twice(cluster, recipe, undisturbed, folder):
    run = Run(cluster, folder / "run").start(recipe, "--nodes=2")
    for restart in range(2):
        run.hold(restart)
        urgent = cluster.submit(*URGENT, "--wrap=true", folder=folder)
        cluster.wait_for_end(urgent)
    assert run.end() == ("COMPLETED", "0:0", 2)
    assert run.log.read_text().count("the ranks ended with 85") == 2
    assert run.result() == undisturbed


def test_requeued_a_node_down_and_a_rank_killed(cluster, recipe, undisturbed, folder):
    run = Run(cluster, folder / "run").start(recipe, "--nodes=2")
    run.hold(restart=0)
    cluster.run("scontrol", "requeue", run.job)

    run.hold(restart=1)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.wait_until(run.job, "PENDING")
    cluster.run("scontrol", "update", "nodename=node2", "state=resume")

    run.hold(restart=2)
    ranks = cluster.ranks(run.job)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    state, code, restarts = run.end()
    assert (state, restarts) == ("FAILED", 2) and code != "85:0"
    assert "rank 1 died" in run.log.read_text() and not cluster.ranks(run.job)

    assert run.start(recipe, "--nodes=2").end() == ("COMPLETED", "0:0", 0)
    assert run.result() == undisturbed


def test_submitted_on_four_ranks_until_its_time_is_up(cluster, recipe, tiny, undisturbed, folder):
    """`speft submit` on 2 nodes with 2 ranks each, and the evaluation behind it."""
    run = Run(cluster, folder / "run")
    scored = ["eval.tasks=[tiny_choice]", f"eval.include_path={tiny['tasks']}", "eval.limit=9"]
    later = ["eval.before=false", "eval.after=false", f"output_dir={run.folder}"]
    speft = [sys.executable, "-m", "speft_ds.cli.main", "submit", str(recipe), *scored, *later]
    told = cluster.run(*speft, "--nodes=2", "--ranks-per-node=2", "--evaluate", folder=ROOT, **ENV)
    run.job, evaluation = re.search(r"job (\d+): .*\n  evaluate  job (\d+)", told, re.DOTALL).groups()
    assert f"tail -F {run.log}" in told and (run.folder / "submit.sbatch").is_file()

    run.hold(restart=0)
    for name in ("USR1", "CONT"):  # as --signal does ahead of the time limit
        cluster.run("scancel", f"--signal={name}", run.job)
    assert run.end() == ("COMPLETED", "0:0", 1)
    losses, others = ([loss for loss, _, _ in lines] for lines in (run.result()[1], undisturbed[1]))
    assert losses == pytest.approx(others, abs=1e-4)  # of four ranks against two

    assert cluster.wait_for_end(evaluation) == ("COMPLETED", "0:0", 0)
    scored = json.loads((run.folder / "eval" / "tuned-tiny_choice-limit9.json").read_text())
    assert [(row["task"], row["num_documents"]) for row in scored["scores"]] == [("tiny_choice", 9)]
    again = subprocess.run(speft, env=cluster.env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "is finished" in again.stderr


def test_an_array_of_three(cluster, recipe, folder):
    lines = [f"{recipe} train.steps=4 optimizer.lr={rate}" for rate in (1e-3, 1e-2, 3e-2)]
    (folder / "rates.txt").write_text("\n".join(lines))
    job = cluster.submit("--array=1-3", SCRIPTS / "array.sbatch", "rates.txt", folder=folder, **ENV)
    for number in (1, 2, 3):
        assert cluster.wait_for_end(f"{job}_{number}") == ("COMPLETED", "0:0", 0)
    runs = [folder / "runs" / "rates" / str(number) for number in (1, 2, 3)]
    assert len({(run / "adapter" / "adapter.safetensors").read_bytes() for run in runs}) == 3
