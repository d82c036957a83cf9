"""Loading a recipe: precedence, problems, the resolved recipe, and what a job makes of it."""

import pickle
import subprocess
import sys
from typing import get_args

import pytest

from speft_ds.config.load_recipe import RECIPES_DIR, load_recipe, resolved_yaml
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.recipe import FIELDS, resolve
from speft_ds.config.train_config import TrainConfig
from speft_ds.env import expand_path
from speft_ds.errors import RecipeError
from unit.written import load, refused

pytestmark = pytest.mark.usefixtures("own_folder")


def test_precedence_is_default_then_yaml_then_override(tmp_path):
    assert load(tmp_path).optimizer.lr == 1e-3
    assert load(tmp_path, "optimizer: {lr: 2e-4}").optimizer.lr == 2e-4
    assert load(tmp_path, "optimizer: {lr: 2e-4}", "optimizer.lr=3e-4").optimizer.lr == 3e-4
    assert load(tmp_path, "optimizer: {lr: 2e-4}", "optimizer.eps=1e-6").optimizer.lr == 2e-4
    assert load(tmp_path, "", "seed=1", "seed=2").seed == 2
    assert load(tmp_path, "seed: wrong", "seed=3").seed == 3  # an override may fix the file


def test_an_override_is_split_at_the_first_equals_sign_and_read_as_yaml(tmp_path):
    overrides = ["data.path=a=b.jsonl", "mask.targets=[q_proj, '*v_proj']", "eval.before=false"]
    recipe = load(tmp_path, "", *overrides)
    assert recipe.data.path == "a=b.jsonl"
    assert recipe.mask.targets == ["q_proj", "*v_proj"]
    assert recipe.eval.before is False


@pytest.mark.parametrize("written", ["1e-3", "1E-03", "0.001", ".1e-2", "1.e-3", "1.0e-3"])
def test_floats_in_any_notation(tmp_path, written):
    assert load(tmp_path, f"optimizer: {{lr: {written}}}").optimizer.lr == pytest.approx(1e-3)


def test_integers_are_accepted_for_floats(tmp_path):
    recipe = load(tmp_path, "optimizer: {clip_norm: 2, betas: [0, 0.5]}\nmask: {density: 1}")
    assert (recipe.optimizer.clip_norm, recipe.optimizer.betas, recipe.mask.density) == (2.0, [0.0, 0.5], 1.0)


def test_name_and_output_dir_come_from_the_file(tmp_path):
    recipe = load(tmp_path)
    assert (recipe.name, recipe.output_dir) == ("mine", "runs/mine")
    assert load(tmp_path, "output_dir: elsewhere").output_dir == "elsewhere"
    assert load(tmp_path, "output_dir: null").output_dir == "runs/mine"


def test_an_empty_section_and_a_key_written_in_full(tmp_path):
    assert load(tmp_path, "mask:\n").mask == MaskConfig()
    recipe = load(tmp_path, "mask.density: 0.1\noutput_dir: 2024-01-31")
    assert recipe.mask.density == 0.1 and recipe.where("mask.density") == "mine.yaml:5 (mask.density)"
    assert recipe.output_dir == "2024-01-31"  # no date


def test_paths_follow_home_and_xdg(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert expand_path("~/.cache/x") == "/home/someone/.cache/x"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/")
    assert expand_path("~/.cache/x") == "/fast/x"
    assert expand_path("~/.cached/x") == "/home/someone/.cached/x"
    assert expand_path("owner/name") == "owner/name"
    recipe = load_recipe("quickstart")
    for path in (recipe.model.name_or_path, recipe.data.path, recipe.eval.include_path):
        assert path.startswith("/fast/speft_ds/")


@pytest.mark.parametrize("module", ["cli.launch", "cli.main"])  # they import all that is checked before a run
def test_import_is_light(module):
    code = (
        f"import sys, speft_ds.{module}; "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    env = {"PYTHONPATH": str(RECIPES_DIR.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Problems: all at once, each once (one by one: `jobs/test_bad_inputs.py`)


@pytest.mark.parametrize("path", ["nowhere/x.yaml", "mine.yaml"])
def test_a_file_that_is_missing_or_not_utf_8(tmp_path, path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=f"where: {path}"):
        load_recipe(path)


def test_all_mistakes_are_shown_at_once_with_their_lines(tmp_path):
    text = "mask:\n  desnity: 0.1\n  salience: gradiant\ntrain: {steps: 10}\noptimizer:\n  lr: -1\n"
    error = refused(tmp_path, text, "seed=x", "foo")
    assert sorted(problem.where for problem in error.problems) == [
        "command line: foo",
        "command line: seed=x",
        "mine.yaml:10 (optimizer.lr)",
        "mine.yaml:6 (mask.desnity)",
        "mine.yaml:7 (mask.salience)",
    ]
    shown = str(error)
    assert all(f"\n  {number}. " in shown for number in range(1, 6)) and "pydantic" not in shown
    assert str(pickle.loads(pickle.dumps(error))) == shown  # as another process shows it


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("mask: {density: 0.1, num_trainable: 5, budget: x}\ntrain: {micro_batch: 3}", 3),
        ("mask: {lift_rank: 2, gate_every: 3, topk_fraction: 0.1, layers: [2, 1]}", 4),
        ("mask: {salience: grasp, zzz: 1}\noptimizer: {warmup_steps: 9}\ntrain: {steps: 5}", 3),
        # What is wrong is no reason to refuse what goes with it.
        ("mask: {schedule: drop_gro, update_every: 3, growth_steps: 7, layer_gate: half}", 1),
        ("optimizer: {name: adamax, eps: 1e-6, momentum: 0.9, betas: [0.9, 0.8]}", 1),
    ],
)
def test_mistakes_neither_hide_nor_repeat_each_other(tmp_path, text, number):
    problems = refused(tmp_path, text).problems
    assert len(problems) == number == len({problem.where for problem in problems})


# The resolved recipe

SALIENCES = [
    [f"mask.salience={name}", *(["model.base_format=int8"] if name == "quant_error" else [])]
    for name in get_args(FIELDS["mask.salience"].annotation)
]
OPTIMIZERS = [[f"optimizer.name={name}"] for name in get_args(FIELDS["optimizer.name"].annotation)]
CHOICES = [
    [],
    ["mask.num_trainable=7", "train.steps=3", "mask.targets=[a, b]"],
    ["mask.layers=[0,0]", "mask.calibration_seed=0", "mask.calibration_path=c.jsonl"],
    ["mask.load=mask.safetensors", "mask.score_device=host"],
    ["mask.granularity=block", "mask.block_size=8", "mask.budget=per_layer"],
    ["mask.granularity=row"],
    ["mask.granularity=column"],
    ["mask.granularity=head"],
    ["mask.granularity=channel", "mask.budget=per_layer"],
    ["mask.budget=per_row"],
    ["mask.salience=lift", "mask.lift_rank=4"],
    ["mask.schedule=static", "mask.update_every=100"],  # a default may always stand there
    ["mask.schedule=periodic", "mask.update_every=9", "train.steps=10", "mask.granularity=block"],
    ["mask.schedule=drop_grow", "mask.update_every=7", "mask.growth_steps=7", "mask.drop_anneal=cosine"],
    ["mask.schedule=drop_grow", "mask.growth=sft_ma", "mask.update_every=2", "mask.drop_rate=0.5"],
    ["mask.schedule=grad_topk", "mask.topk_fraction=1", "mask.layer_gate=half", "mask.gate_every=3"],
    ["mask.schedule=periodic", "mask.layer_gate=sampled", "mask.gate_layers=1"],
    ["mask.layer_gate=importance", "mask.gate_every=7"],
    ["mask.only_nonzero=true", "mask.budget=per_row"],
    ["data.path=null", "mask.salience=magnitude"],
]


@pytest.mark.parametrize("overrides", [["model.dtype=float32", *o] for o in CHOICES + SALIENCES + OPTIMIZERS])
def test_resolved_yaml_loads_again_as_the_same_recipe(tmp_path, overrides):
    """It gives every key a value, those without effect, too."""
    recipe = load(tmp_path, "", *overrides)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.yaml").write_text(resolved_yaml(recipe))
    again = load_recipe("again/mine.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert resolved_yaml(again) == resolved_yaml(recipe)


# What a job makes of it


@pytest.mark.parametrize("text", ["", "output_dir: null"])
def test_scoring_has_a_run_folder_of_its_own(tmp_path, text):
    recipe = load(tmp_path, text, "mask.salience=snip")
    scoring = resolve(recipe, job="score", world_size=2)
    assert scoring.output_dir == "runs/mine-score-snip" and recipe.output_dir == "runs/mine"
    assert scoring.where("output_dir") == "output_dir (default)"
    assert scoring.where("mask.salience") == recipe.where("mask.salience")
    assert scoring.model_copy(update={"output_dir": recipe.output_dir}) == recipe


@pytest.mark.parametrize("job", ["train", "score", "evaluate"])
@pytest.mark.parametrize(("text", "overrides"), [("", ["output_dir=here"]), ("output_dir: here", [])])
def test_nothing_else_is_changed(tmp_path, job, text, overrides):
    recipe = load(tmp_path, text, *overrides)
    assert resolve(recipe, job=job, world_size=7) is recipe


def test_a_resumed_run_has_a_micro_batch_that_its_ranks_share(tmp_path):
    """The largest part of the old one of which every rank takes as many; else it stays."""
    recipe = load(tmp_path)
    for batch in range(1, 25):
        for micro in [m for m in range(1, batch + 1) if batch % m == 0]:
            given = recipe.model_copy(update={"train": TrainConfig(global_batch=batch, micro_batch=micro)})
            for world_size in range(1, 13):
                resumed = resolve(given, job="train", world_size=world_size, fits_micro_batch=True)
                fits = [m for m in range(1, micro + 1) if micro % m == 0 and batch % (m * world_size) == 0]
                train = given.train.model_copy(update={"micro_batch": max(fits, default=micro)})
                assert resumed == given.model_copy(update={"train": train})
