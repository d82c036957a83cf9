"""`speft submit`: the script that it writes, what it refuses before the queue, and what it says."""

import json
import sys

import pytest

from speft_ds.config.load_recipe import ROOT, load_recipe, resolved_yaml
from unit.commands import run
from unit.written import write_inputs


@pytest.fixture
def submit(own_folder, tmp_path, monkeypatch, capsys):
    """`submit(*words, code=0)`: what it says, in a folder with a recipe and all that it names; no Slurm."""
    write_inputs(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def typed(*words, code=0):
        assert run(monkeypatch, "submit", *words) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return typed


@pytest.fixture
def sbatch(tmp_path):
    """A stand-in for sbatch, which counts from 7; returns how it was called so far."""
    (tmp_path / "bin").mkdir()
    log, tool = tmp_path / "calls.jsonl", tmp_path / "bin" / "sbatch"
    tool.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\nlog = pathlib.Path({str(log)!r})\n"
        "calls = log.read_text().splitlines() if log.exists() else []\n"
        "log.write_text('\\n'.join([*calls, json.dumps(sys.argv[1:])]))\nprint(f'{7 + len(calls)};cluster')\n"
    )
    tool.chmod(0o755)
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_the_script_word_by_word(tmp_path, submit):
    options = "--nodes 2 --gpus-per-node 8 --time 1:00:00 --partition p --account a --qos q --sbatch --mem=9G"
    words = ["mask.layers=[0, 9]", "--resume-with", "eval.limit=3", "--sbatch", "--constraint=a100"]
    assert submit("mine.yaml", *options.split(), *words, "--dry-run") == (
        "#!/usr/bin/env bash\n"
        "# Written by `speft submit`; sbatch takes it again.\n"
        "#SBATCH --job-name=mine\n"
        f"#SBATCH --output={tmp_path}/runs/mine/slurm-%j.out\n"
        f"#SBATCH --chdir={tmp_path}\n"
        "#SBATCH --requeue\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --signal=USR1@120\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=8\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --time=1:00:00\n"
        "#SBATCH --partition=p\n"
        "#SBATCH --account=a\n"
        "#SBATCH --qos=q\n"
        "#SBATCH --mem=9G\n"
        "#SBATCH --constraint=a100\n"
        f"export SPEFT_ROOT={ROOT}\n"
        f"export SPEFT_PYTHON={sys.executable}\n"
        "export DS_ACCELERATOR=cpu\n"
        f"exec bash {ROOT}/launch/slurm/train.sbatch "
        "mine.yaml 'mask.layers=[0, 9]' --resume-with eval.limit=3\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_odd_characters(tmp_path, submit):
    script = submit("mine.yaml", "output_dir=50% of it", "--dry-run")
    assert f"#SBATCH '--output={tmp_path}/50%% of it/slurm-%j.out'\n" in script
    assert script.endswith("mine.yaml 'output_dir=50% of it'\n")


def test_a_dry_run_prints_the_script_alone_and_needs_no_files(submit):
    """All else goes to stderr, as the note of another micro-batch: the script may go into a pipe."""
    shape = ["--nodes", "2", "--ranks-per-node", "4", "train.micro_batch=4", "train.global_batch=16"]
    script = submit("llama2_13b_alpaca", *shape, "--dry-run")
    assert script.startswith("#!") and "note:" not in script and "#SBATCH --ntasks-per-node=4\n" in script


def test_a_job_and_its_evaluation_are_submitted(tmp_path, sbatch, submit):
    shown = submit("mine.yaml", "eval.tasks=[arc_easy]", "--nodes", "2", "--evaluate")
    folder = tmp_path / "runs" / "mine"
    assert sbatch() == [
        ["--parsable", str(folder / "submit.sbatch")],
        ["--parsable", "--dependency=afterok:7", str(folder / "slurm-evaluate.sbatch")],
    ]
    assert (folder / "slurm-evaluate.sbatch").read_text().endswith(f"/launch/slurm/eval.sbatch {folder}\n")
    for part in ("job 7: mine on 2 x 1 ranks\n", f"tail -F {folder}/slurm-7.out\n", "scancel 7", "job 8"):
        assert part in shown


REFUSED = {
    "a typo": (["mask.desnity=1"], "mask.density"),
    "no model": (["model.name_or_path=./nowhere"], "./nowhere"),
    "a batch that ranks cannot share": (["--nodes=3"], "train.global_batch="),
    "no option": (["--sbatch", "constraint=a100"], "--constraint=a100"),
    "nothing to evaluate": (["--evaluate"], "eval.tasks=[arc_easy]"),
    "no nodes": (["--nodes=0"], "--nodes"),
    "a folder of something else": (["output_dir=model"], "output_dir=..."),
    "a finished run": (["output_dir=done"], "is finished"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_cost_no_time_in_the_queue(name, sbatch, submit, tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "run.json").write_text('{"finished": true}')
    (tmp_path / "done" / "recipe.yaml").write_text(resolved_yaml(load_recipe("mine.yaml")))
    arguments, shown = REFUSED[name]
    assert shown in submit("mine.yaml", *arguments, code=2)
    assert sbatch() == [] and not (tmp_path / "runs").exists()


def test_without_slurm_it_points_to_the_dry_run(tmp_path, submit):
    assert "--dry-run" in submit("mine.yaml", code=2) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("refused", "submitted"),
    [("*", "nothing is submitted"), ("*afterok*", "job 7, which trains, is submitted")],
)
def test_a_refusal_of_sbatch_is_passed_on_with_what_is_submitted(
    sbatch, submit, tmp_path, refused, submitted
):
    refuse = f'case "$*" in {refused}) echo "sbatch: error: no queue" >&2; exit 1;; esac; echo 7\n'
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refuse}")
    shown = submit("mine.yaml", "eval.tasks=[arc_easy]", "--evaluate", code=2)
    assert f": no queue; {submitted}" in shown


def test_a_link_in_the_place_of_the_script_is_replaced(tmp_path, submit, sbatch):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    script = tmp_path / "runs" / "mine" / "submit.sbatch"
    script.symlink_to(notes)
    submit("mine.yaml")
    assert notes.read_text() == "mine\n" and not script.is_symlink() and "#SBATCH" in script.read_text()
