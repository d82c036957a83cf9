"""The batch scripts on a real Slurm; what the ranks do is played by `stand_in.py`."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from distributed.test_readme import commands

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "launch" / "slurm"
STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def start(cluster, folder):
    """Submit a script whose ranks are played; returns the job's number and its log."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase $1 in */launch/*) exec {sys.executable} {STAND_IN} "$@";; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    def submit(how, *options, script="train", arguments=("quickstart", "output_dir=run")):
        words = [*options, SCRIPTS / f"{script}.sbatch", *arguments]
        job = cluster.submit(*words, folder=folder, SPEFT_ROOT=ROOT, SPEFT_PYTHON=python, STAND_IN=how)
        return job, folder / "run" / f"slurm-{job}.out"

    return submit


def said(log, key):
    """What the played ranks say of a key: by rank, the last word."""
    lines = log.read_text().splitlines() if log.is_file() else []
    facts = [json.loads(line) for line in lines if line.startswith("{")]
    return {fact["rank"]: fact[key] for fact in sorted(facts, key=lambda f: f["rank"]) if key in fact}


def wait_for_ranks(cluster, job, log):
    cluster.wait_during(job, lambda: len(said(log, "ready")) == 2, f"two ranks in {log}")


def test_ranks_are_told_who_they_are(cluster, start):
    job, log = start("exit 0", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    assert cluster.wait_for_end(job) == ("COMPLETED", "0:0", 0)
    assert said(log, "SLURM_LOCALID") == {0: "0", 1: "1", 2: "0", 3: "1"}
    assert set(said(log, "CUDA_VISIBLE_DEVICES").values()) == {"0,1"}  # all of a node: LOCAL_RANK chooses
    assert set(said(log, "MASTER_ADDR").values()) == {"node1"}
    (port,) = set(said(log, "MASTER_PORT").values())
    assert 10_000 <= int(port) < 30_000
    argv = [str(ROOT / "launch/train.py"), "--recipe", "quickstart", "--resume", "auto", "output_dir=run"]
    assert all(words == argv for words in said(log, "argv").values())


def test_a_failure_is_not_run_again(cluster, start):
    codes = {code: start(f"exit {code}", "--nodes=2")[0] for code in (1, 2, 137)}
    for code, job in codes.items():
        assert cluster.wait_for_end(job) == ("FAILED", f"{code}:0", 0)


SIGNALS = {
    "time limit": ["scancel", "--signal=USR1"],
    "the shell alone": ["scancel", "--batch", "--signal=TERM"],
    "requeue": ["scontrol", "requeue"],
}


@pytest.fixture(params=["1,85", None])
def requeue_exit(cluster, request):
    """Whether Slurm requeues by itself (RequeueExit), or the script has to ask for it."""
    cluster.use(request.param)
    yield request.param
    if request.param is None:  # the last
        cluster.use("85")


def test_a_stopped_run_is_run_again(cluster, requeue_exit, start):
    """Unless it was cancelled, or may not be requeued (which does not hold against RequeueExit)."""
    jobs = {name: start("wait", "--nodes=2") for name in [*SIGNALS, "cancelled"]}
    jobs["not to requeue"] = start("wait", "--nodes=2", "--no-requeue")
    after = f"--dependency=afterok:{jobs['time limit'][0]}"
    behind = cluster.submit(after, "--output=/dev/null", "--wrap=true", folder=ROOT)
    for job, log in jobs.values():
        wait_for_ranks(cluster, job, log)
    signals = SIGNALS | {"cancelled": ["scancel"], "not to requeue": ["scancel", "--signal=USR1"]}
    for name, (job, _) in jobs.items():
        cluster.run(*signals[name], job)

    for name in SIGNALS:
        job, log = jobs[name]
        assert cluster.wait_for_end(job) == ("COMPLETED", "0:0", 1), name
        assert log.read_text().count("the ranks ended with 85") == 1, name
    assert cluster.wait_for_end(behind) == ("COMPLETED", "0:0", 0)
    assert cluster.wait_for_end(jobs["cancelled"][0]) == ("CANCELLED", "85:0", 0)
    job, log = jobs["not to requeue"]
    if requeue_exit is None:
        assert cluster.wait_for_end(job) == ("FAILED", "85:0", 0)
        assert "to go on: sbatch the same again" in log.read_text()


def test_a_signal_does_not_kill_a_python_that_is_coming_up(cluster, start):
    job, log = start("slow", "--nodes=2")
    wait_for_ranks(cluster, job, log)
    for name in ("TERM", "USR1"):
        cluster.run("scancel", f"--signal={name}", job)
    assert cluster.wait_for_end(job) == ("COMPLETED", "0:0", 0)


def test_a_sweep_has_a_job_a_line(cluster, start, folder):
    lines = ["quickstart seed=1", "", "# a note", "  quickstart 'mask.layers=[0, 9]' output_dir=mine"]
    (folder / "rates.txt").write_text("\n".join(lines))
    job, _ = start("exit 0", "--array=1-3", script="array", arguments=["rates.txt", "seed=7"])
    states = [cluster.wait_for_end(f"{job}_{n}")[0] for n in (1, 2, 3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    begin = ["--recipe", "quickstart", "--resume", "auto"]
    words = said(folder / f"runs/rates/1/slurm-{job}_1.out", "argv")[0]
    assert words[1:] == [*begin, "output_dir=runs/rates/1", "seed=1", "seed=7"]
    words = said(folder / f"mine/slurm-{job}_2.out", "argv")[0]
    assert words[1:] == [*begin, "output_dir=runs/rates/2", "mask.layers=[0, 9]", "output_dir=mine", "seed=7"]
    (log,) = folder.glob("slurm-*_3.out")
    assert "rates.txt has no line 3" in log.read_text() and "--array=1-2" in log.read_text()


def test_an_evaluation_gets_its_run(cluster, start, folder):
    (folder / "run").mkdir()
    job, log = start("exit 0", script="eval", arguments=["run", "--tasks", "a,b", "--limit", "3"])
    assert cluster.wait_for_end(job) == ("COMPLETED", "0:0", 0)
    script, *words = said(log, "argv")[0]
    assert script.endswith("launch/evaluate.py")
    assert words == ["--run", "run", "--tasks", "a,b", "--limit", "3"]


MISTAKES = {
    "no recipe": ("train", [], {}, "RECIPE [KEY=VALUE ...]"),
    "a typo": ("train", ["quickstrat"], {}, "did you mean quickstart?"),
    "no root": ("train", ["quickstart"], {"SPEFT_ROOT": "/nowhere"}, "export SPEFT_ROOT=/path/of/it"),
    "no python": ("train", ["quickstart"], {"SPEFT_PYTHON": "/nowhere/python"}, "export SPEFT_PYTHON="),
    "no run": ("eval", ["nowhere"], {}, "no run folder nowhere"),
    "no array": ("array", ["/etc/hostname"], {}, "sbatch --array=1-1"),
}


def test_mistakes_are_told_in_the_log(cluster, folder):
    jobs = {}
    for name, (script, arguments, variables, _) in MISTAKES.items():
        env = {"SPEFT_ROOT": ROOT, "SPEFT_PYTHON": sys.executable, **variables}
        jobs[name] = cluster.submit(SCRIPTS / f"{script}.sbatch", *arguments, folder=folder, **env)
    for name, job in jobs.items():
        assert cluster.wait_for_end(job) == ("FAILED", "2:0", 0), name
        told = (folder / f"slurm-{job}.out").read_text()
        assert MISTAKES[name][-1] in told and "Traceback" not in told, told


def test_every_sbatch_command_of_the_readme_would_be_taken(cluster, folder):
    found = [words.partition("sbatch ")[2] for words in commands(["launch/README.md"]) if "sbatch " in words]
    assert len(found) >= 4
    for words in found:
        options = [word for word in shlex.split(words) if not word.startswith("--dependency")]
        cluster.run("sbatch", "--test-only", *options, folder=ROOT)
