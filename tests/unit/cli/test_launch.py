"""The launched scripts before the job: arguments, help, checks; and how they end."""

import json
import os
import subprocess
import sys
import types
from unittest import mock

import pytest

from speft_ds.cli import launch
from speft_ds.cli.start_ranks import find_deepspeed
from speft_ds.config.deepspeed_config import read_ds_config
from speft_ds.config.load_recipe import ROOT
from speft_ds.errors import RecipeError, UserError
from unit.written import write_inputs


@pytest.fixture
def ready(tmp_path, own_folder):
    """A folder with mine.yaml and what it names."""
    write_inputs(tmp_path)


@pytest.fixture
def started(tmp_path):
    """Start a script as the launcher does, with a module torch that cannot be imported."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")

    def start(job, *arguments, **environment):
        command = [sys.executable, str(ROOT / "launch" / f"{job}.py"), *arguments]
        env = os.environ | {"PYTHONPATH": str(tmp_path / "stub")} | environment
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return start


@pytest.mark.parametrize("job", ["train", "score"])
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--recipe", "mine.yaml", "mask.desnity=1"], 2, "mask.density"),
        (["--local_rank=0", "--recipe", "mine.yaml", "model.name_or_path=./nowhere"], 2, "./nowhere"),
        (["--recipe", "mine.yaml", "data.path=null"], 2, "data"),
        (["--recipe", "mine.yaml", "output_dir=model"], 2, "model is not empty"),
        (["--recipe", "mine.yaml"], 1, "RuntimeError: torch was imported"),  # all checks passed
        ([], 2, "--recipe"),
    ],
)
def test_a_launched_script_checks_before_it_imports_torch(ready, started, job, arguments, code, text):
    done = started(job, *arguments)
    assert (done.returncode, done.stdout) == (code, "") and text in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


# The job


@pytest.fixture
def with_job(ready, monkeypatch):
    """Replace the module of a job, and type the command line of its script."""
    monkeypatch.setattr("speft_ds.comm.signals.watch_signals", lambda: None)

    def replace(job, run, *words):
        module = types.ModuleType(f"speft_ds.jobs.{job}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys, "argv", ["script", "--local_rank=0", *words])

    with mock.patch.dict(os.environ):  # a job sets variables for the libraries
        yield replace


@pytest.mark.parametrize(("job", "folder"), [("train", "runs/mine"), ("score", "runs/mine-score-gradient")])
def test_a_launched_script_runs_its_job(with_job, job, folder):
    called = mock.Mock()
    with_job(job, called, "--recipe", "mine.yaml", "seed=3")
    with pytest.raises(SystemExit) as left:
        launch.start(job, "What it does.")
    recipe = called.call_args.args[0]
    assert left.value.code == 0 and (recipe.output_dir, recipe.seed) == (folder, 3)


def test_options_of_an_evaluation_are_keys_of_its_recipe(with_job):
    job = mock.Mock()
    words = ["--model", "./model", "--tasks", "a,b", "--limit", "3", "--num-fewshot", "2", "eval.limit=4"]
    with_job("evaluate", job, *words)
    assert launch.main("evaluate", launch.parse_arguments("evaluate", "")) == 0
    recipe, adapter, low_bits = job.call_args.args
    section = recipe.eval
    assert (section.tasks, section.num_fewshot, section.limit) == (["a", "b"], 2, 4)
    assert (recipe.model.name_or_path, recipe.output_dir, adapter) == ("./model", "runs/evaluate-model", None)
    assert low_bits.facts == {}


def test_an_evaluation_in_few_bits_of_a_text_alone(with_job, tmp_path):
    job = mock.Mock()
    (tmp_path / "text.txt").write_text("words")
    words = ["--model", "./model", "--text", "text.txt", "--weights", "bfp6", "--activations=mxfp4"]
    with_job("evaluate", job, *words)
    assert launch.main("evaluate", launch.parse_arguments("evaluate", "")) == 0
    recipe, _, low_bits = job.call_args.args
    assert recipe.eval.tasks == [] and recipe.eval.forgetting_text == "text.txt"
    assert low_bits.facts == {"weights": "bfp6", "activations": "mxfp4"}


@pytest.mark.parametrize(
    ("words", "where", "fix"),
    [
        (["--weights", "bfp7", "--tasks", "a"], "--weights", "bfp6"),
        (["--activations", "float8", "--tasks", "a"], "--activations", "nf4"),
        (["--weights", "bfp6", "--tasks", "a", "model.base_format=nf4"], "--weights", "leave it out"),
        ([], "--tasks", "--text"),
        (["--text", "gone.txt"], "command line: eval.forgetting_text=gone.txt", "eval.forgetting_text="),
    ],
)
def test_an_evaluation_of_nothing_or_in_no_format_is_refused(with_job, words, where, fix):
    with_job("evaluate", mock.Mock(), "--model", "./model", *words)
    with pytest.raises(UserError) as caught:
        launch.checked_start("evaluate", launch.parse_arguments("evaluate", ""), 1)
    (problem,) = getattr(caught.value, "problems", [caught.value])
    assert problem.where == where and fix in problem.fix


def test_a_base_is_loaded_as_its_adapter_was_trained_on_it(with_job, tmp_path):
    job, facts = mock.Mock(), {"dtype": "float32", "base_format": "nf4"}
    (tmp_path / "adapter.json").write_text(json.dumps(facts))
    with_job("evaluate", job, "--model", "./model", "--adapter", str(tmp_path), "--tasks", "a")
    assert launch.main("evaluate", launch.parse_arguments("evaluate", "")) == 0
    recipe = job.call_args.args[0]
    assert {"dtype": recipe.model.dtype, "base_format": recipe.model.base_format} == facts


def test_a_run_is_evaluated_under_its_own_name_and_in_its_folder(with_job, tmp_path):
    folder, job = tmp_path / "runs" / "first", mock.Mock()
    (folder / "adapter").mkdir(parents=True)
    (folder / "recipe.yaml").write_text((tmp_path / "mine.yaml").read_text() + "output_dir: elsewhere\n")
    with_job("evaluate", job, "--run", str(folder), "--tasks", "a")
    assert launch.main("evaluate", launch.parse_arguments("evaluate", "")) == 0
    recipe, adapter, _ = job.call_args.args
    assert (recipe.name, recipe.output_dir, adapter) == ("first", str(folder), folder / "adapter")


GONE = """
mask: {load: gone/mask.safetensors, targets: [odd], calibration_path: gone.jsonl, salience: grasp}
deepspeed: {config: gone/ds.json}
eval: {tasks: [mine], include_path: gone, data_dir: gone, forgetting_text: gone.txt, validation: gone.jsonl}
"""


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ([], 0),
        (["eval.include_path=typo"], 1),  # what is asked for now is looked for
        (["deepspeed.config=typo.json", "eval.data_dir=typo"], 2),
    ],
)
def test_a_finished_run_is_scored_without_what_it_was_made_from(with_job, tmp_path, words, problems):
    folder, job = tmp_path / "runs" / "first", mock.Mock()
    (folder / "adapter").mkdir(parents=True)
    own = (tmp_path / "mine.yaml").read_text() + GONE
    (folder / "recipe.yaml").write_text(own)
    (tmp_path / "rows.jsonl").unlink()
    with_job("evaluate", job, "--run", str(folder), *words)
    arguments = launch.parse_arguments("evaluate", "")
    if problems:
        with pytest.raises(RecipeError) as caught:
            launch.checked_start("evaluate", arguments, 1)
        assert len(caught.value.problems) == problems
    else:
        recipe, _ = launch.checked_start("evaluate", arguments, 1)
        assert recipe.mask.load is recipe.mask.targets is None and not read_ds_config(recipe)[1]


@pytest.mark.parametrize("mask", ["salience: quant_error", "start: exact", "salience: lift, lift_rank: 4"])
def test_a_finished_run_in_few_bits_is_scored_without_its_original_weights(with_job, tmp_path, mask):
    folder = tmp_path / "runs" / "first"
    (folder / "adapter").mkdir(parents=True)
    own = (tmp_path / "mine.yaml").read_text().replace("model:", "model:\n  base_format: nf4")
    (folder / "recipe.yaml").write_text(f"{own}mask: {{{mask}}}\n")
    with_job("evaluate", mock.Mock(), "--run", str(folder), "--tasks", "a")
    recipe, _ = launch.checked_start("evaluate", launch.parse_arguments("evaluate", ""), 1)
    assert recipe.model.base_format == "nf4" and not recipe.mask.needs_original


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("the loss is nan", "training"), 2, "the loss is nan\n    where: training"),
        (ValueError("a bug"), 1, "rank 0 failed:\nTraceback"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_an_error_of_the_job_is_shown(with_job, capsys, error, code, text):
    with_job("train", mock.Mock(side_effect=error), "--recipe", "mine.yaml")
    assert launch.main("train", launch.parse_arguments("train", "")) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(text) and ("Traceback" in shown.err) == (code == 1)
    assert shown.out == "" and bool(shown.err) == bool(text)


# Help and usage errors


@pytest.mark.parametrize("job", ["train", "score", "evaluate"])
def test_help_without_torch(started, job):
    done = started(job, "--local_rank=0", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in [f"launch/{job}.py --", "eight GPUs", "on the CPU", "speft schema", "exit codes:"]:
        assert part in done.stdout
    assert "local_rank" not in done.stdout  # the launcher's own


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--recipe"], 2), (["--x=1"], 2)])
def test_other_ranks_say_nothing(started, arguments, code):
    done = started("train", "--local_rank=1", *arguments, RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [(["launch/train.py", "--help"], 0, "exit codes:"), (["launch/score.py", "seed=1"], 2, "--recipe")],
)
def test_help_and_usage_errors_are_printed_once_under_the_launcher(arguments, code, line):
    command = [find_deepspeed(), "--num_gpus", "2", *arguments]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    text = (done.stdout + done.stderr).splitlines()
    assert done.returncode == code and sum(each.startswith("usage:") for each in text) == 1
    assert sum(each == line or "required: " + line in each for each in text) == 1
