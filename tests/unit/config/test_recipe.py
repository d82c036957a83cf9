"""Recipes: precedence, paths, the run folder, and that a resolved one loads again as the same."""

import subprocess
import sys
from typing import get_args

import pytest
import yaml

from speft_ds.config.load_recipe import RECIPES_DIR, load_recipe, resolved_yaml
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.recipe import FIELDS
from speft_ds.env import expand_path
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")


def test_precedence_is_default_then_yaml_then_override(tmp_path):
    assert load(tmp_path).optimizer.lr == 1e-3
    assert load(tmp_path, "optimizer: {lr: 2e-4}").optimizer.lr == 2e-4
    assert load(tmp_path, "optimizer: {lr: 2e-4}", "optimizer.lr=3e-4").optimizer.lr == 3e-4
    assert load(tmp_path, "optimizer: {lr: 2e-4}", "optimizer.eps=1e-6").optimizer.lr == 2e-4
    assert load(tmp_path, "", "seed=1", "seed=2").seed == 2


def test_an_override_is_split_at_the_first_equals_sign_and_read_as_yaml(tmp_path):
    overrides = ["data.path=a=b.jsonl", "mask.targets=[q_proj, '*v_proj']", "eval.before=false"]
    recipe = load(tmp_path, "", *overrides)
    assert recipe.data.path == "a=b.jsonl"
    assert recipe.mask.targets == ["q_proj", "*v_proj"]
    assert recipe.eval.before is False


def test_an_override_may_fix_the_file(tmp_path):
    assert load(tmp_path, "seed: wrong", "seed=3").seed == 3


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


def test_an_empty_section_is_all_defaults(tmp_path):
    assert load(tmp_path, "mask:\n").mask == MaskConfig()


def test_a_key_may_be_written_in_full(tmp_path):
    recipe = load(tmp_path, "mask.density: 0.1\noutput_dir: 2024-01-31")
    assert recipe.mask.density == 0.1 and recipe.where("mask.density") == "mine.yaml:5 (mask.density)"
    assert recipe.output_dir == "2024-01-31"  # no date


SALIENCES = [[f"mask.salience={name}"] for name in get_args(FIELDS["mask.salience"].annotation)]
CHOICES = [
    [],
    ["mask.num_trainable=7", "train.steps=3", "mask.targets=[a, b]"],
    ["mask.layers=[0,0]", "mask.calibration_seed=0", "mask.calibration_path=c.jsonl"],
    ["mask.load=mask.safetensors", "mask.score_device=host"],
    ["mask.granularity=block", "mask.block_size=8", "mask.budget=per_layer"],
    ["mask.granularity=row"],
    ["mask.granularity=column"],
    ["mask.budget=per_row"],
    ["mask.salience=lift", "mask.lift_rank=4"],
    ["mask.schedule=static", "mask.update_every=100"],  # a default may always stand there
    ["mask.schedule=periodic", "mask.update_every=9", "train.steps=10", "mask.granularity=block"],
    ["mask.schedule=drop_grow", "mask.update_every=7", "mask.growth_steps=7", "mask.drop_anneal=cosine"],
    ["mask.schedule=drop_grow", "mask.growth=sft_ma", "mask.update_every=2", "mask.drop_rate=0.5"],
    ["mask.schedule=grad_topk", "mask.topk_fraction=1", "mask.layer_gate=half", "mask.gate_every=3"],
    ["mask.schedule=periodic", "mask.layer_gate=sampled", "mask.gate_layers=1"],
    ["data.path=null", "mask.salience=magnitude"],
]


@pytest.mark.parametrize("overrides", [["model.dtype=float32", *o] for o in CHOICES + SALIENCES])
def test_resolved_yaml_loads_again_as_the_same_recipe(tmp_path, overrides):
    recipe = load(tmp_path, "", *overrides)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine.yaml").write_text(resolved_yaml(recipe))
    again = load_recipe("again/mine.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert resolved_yaml(again) == resolved_yaml(recipe)


def test_paths_follow_home_and_xdg(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert expand_path("~/.cache/x") == "/home/someone/.cache/x"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/")
    assert expand_path("~/.cache/x") == "/fast/x"
    assert expand_path("~/.cached/x") == "/home/someone/.cached/x"
    assert expand_path("owner/name") == "owner/name"


def test_paths_of_a_recipe_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    recipe = load_recipe("quickstart")
    assert recipe.model.name_or_path.startswith("/fast/speft_ds/")
    assert recipe.data.path.startswith("/fast/speft_ds/")
    assert recipe.eval.include_path.startswith("/fast/speft_ds/")


@pytest.mark.parametrize("module", ["cli.launch", "cli.main"])  # they import all that is checked before a run
def test_import_is_light(module):
    code = (
        f"import sys, speft_ds.{module}; "
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    env = {"PYTHONPATH": str(RECIPES_DIR.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_resolved_yaml_is_plain_yaml(tmp_path):
    plain = yaml.safe_load(resolved_yaml(load(tmp_path)))
    assert plain["optimizer"]["betas"] == [0.9, 0.999] and "name" not in plain
