"""`speft submit`: the script that it writes, what it refuses before the queue, and what it says."""

import json
import subprocess
import sys

import pytest

from speft_ds.cli.commands import submit as module
from speft_ds.cli.commands.submit import Resources, Run, submit
from speft_ds.config.load_recipe import ROOT, load_recipe, resolved_yaml
from speft_ds.errors import RecipeError, UserError
from unit.commands import run
from unit.written import write_inputs

TWO_NODES = Resources(nodes=2, ranks_per_node=1)


@pytest.fixture(autouse=True)
def _own_folder(own_folder, tmp_path, monkeypatch):
    """A folder with a recipe `mine`, all that it names, and no Slurm."""
    write_inputs(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


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


def test_the_script_word_by_word(tmp_path, capsys):
    options = ("--time=1:00:00", "--constraint=a100")
    resources = Resources(nodes=2, ranks_per_node=8, gpus_per_node=8, options=options)
    run = Run("mine.yaml", ("mask.layers=[0, 9]",), ("eval.limit=3",))
    submit(run, resources, evaluate=False, dry_run=True)
    assert capsys.readouterr().out == (
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
        "#SBATCH --constraint=a100\n"
        f"export SPEFT_ROOT={ROOT}\n"
        f"export SPEFT_PYTHON={sys.executable}\n"
        "export DS_ACCELERATOR=cpu\n"
        f"exec bash {ROOT}/launch/slurm/train.sbatch "
        "mine.yaml 'mask.layers=[0, 9]' --resume-with eval.limit=3\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_odd_characters(tmp_path, capsys):
    submit(Run("mine.yaml", ("output_dir=50% of it",)), TWO_NODES, evaluate=False, dry_run=True)
    script = capsys.readouterr().out
    assert f"#SBATCH '--output={tmp_path}/50%% of it/slurm-%j.out'\n" in script
    assert script.endswith("mine.yaml 'output_dir=50% of it'\n")


def test_a_dry_run_prints_the_script_alone(capsys):
    """All else goes to stderr: the script may go into a pipe."""
    submit(Run("mine.yaml", ("train.micro_batch=4",)), Resources(2, 4), evaluate=False, dry_run=True)
    shown = capsys.readouterr()
    assert shown.out.startswith("#!") and "train.micro_batch" in shown.err


def test_a_job_and_its_evaluation_are_submitted(tmp_path, sbatch, capsys):
    submit(Run("mine.yaml", ("eval.tasks=[arc_easy]",)), TWO_NODES, evaluate=True, dry_run=False)
    folder = tmp_path / "runs" / "mine"
    assert sbatch() == [
        ["--parsable", str(folder / "submit.sbatch")],
        ["--parsable", "--dependency=afterok:7", str(folder / "slurm-evaluate.sbatch")],
    ]
    assert (folder / "slurm-evaluate.sbatch").read_text().endswith(f"/launch/slurm/eval.sbatch {folder}\n")
    shown = capsys.readouterr().out
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
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_cost_no_time_in_the_queue(name, sbatch, tmp_path, monkeypatch, capsys):
    arguments, shown = REFUSED[name]
    assert run(monkeypatch, "submit", "mine.yaml", *arguments) == 2
    assert shown in capsys.readouterr().err
    assert sbatch() == [] and not (tmp_path / "runs").exists()


def test_without_slurm_it_points_to_the_dry_run(tmp_path):
    with pytest.raises(UserError, match="no sbatch") as caught:
        submit(Run("mine.yaml"), TWO_NODES, evaluate=False, dry_run=False)
    assert "--dry-run" in caught.value.fix and not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_files_of_the_recipe(capsys):
    submit(Run("llama2_13b_alpaca"), Resources(2, 4, 4), evaluate=False, dry_run=True)
    assert "train.sbatch llama2_13b_alpaca\n" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="not divisible"):
        submit(Run("llama2_13b_alpaca"), Resources(3, 7), evaluate=False, dry_run=True)


@pytest.mark.parametrize(
    ("refused", "submitted"),
    [("*", "nothing is submitted"), ("*afterok*", "job 7, which trains, is submitted")],
)
def test_a_refusal_of_sbatch_is_passed_on_with_what_is_submitted(sbatch, tmp_path, refused, submitted):
    refuse = f'case "$*" in {refused}) echo "sbatch: error: no queue" >&2; exit 1;; esac; echo 7\n'
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refuse}")
    with pytest.raises(UserError, match=f": no queue; {submitted}"):
        submit(Run("mine.yaml", ("eval.tasks=[arc_easy]",)), TWO_NODES, evaluate=True, dry_run=False)


def test_a_finished_run_is_not_submitted_again(sbatch, tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"finished": true}')
    (folder / "recipe.yaml").write_text(resolved_yaml(load_recipe("mine.yaml")))
    with pytest.raises(UserError, match="is finished"):
        submit(Run("mine.yaml"), TWO_NODES, evaluate=False, dry_run=False)
    assert sbatch() == []


def test_options_of_the_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "submit", lambda *arguments: calls.append(arguments))
    words = "quickstart seed=1 --nodes 2 --gpus-per-node 4 --time 2:00 --partition p --account a --qos q"
    words += " --sbatch --constraint=a100 --sbatch --mem=9G --resume-with eval.limit=3 --evaluate"
    assert run(monkeypatch, "submit", *words.split()) == 0
    options = ("--time=2:00", "--partition=p", "--account=a", "--qos=q", "--constraint=a100", "--mem=9G")
    job = Run("quickstart", ("seed=1",), ("eval.limit=3",))
    assert calls[0] == (job, Resources(2, 4, 4, options), True, False)
    run(monkeypatch, "submit", "quickstart", "--ranks-per-node", "3", "--dry-run")
    assert calls[1] == (Run("quickstart"), Resources(1, 3), False, True)


def test_it_imports_no_torch():
    code = "import sys, speft_ds.cli.commands.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
