"""Checks of model, tasks, batch and run folder before torch is imported."""

import pytest

from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import RecipeError, UserError
from speft_ds.jobs.preflight import check_inputs
from speft_ds.training.run_dir import check_output_dir
from unit.test_preflight.made import problems_of


def test_good_inputs_pass(ready, tmp_path):
    check_inputs(ready(), 2)
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "response": "b"}]')
    check_inputs(ready("data.path=rows.json"), 1)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
def test_a_missing_model_folder(ready, name):
    shown = problems_of(ready(f"model.name_or_path={name}"))
    assert f"no model folder {name}" in shown and "model.name_or_path=/the/right/path" in shown


@pytest.mark.parametrize("xdg", [None, "elsewhere"])
def test_what_the_quickstart_prepares_is_named(ready, tmp_path, monkeypatch, xdg):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg))
    with pytest.raises(RecipeError) as caught:
        check_inputs(load_recipe("quickstart"), 2)
    fixes = [p.fix for p in caught.value.problems]
    assert fixes == ["run `speft quickstart --prepare-only`, which makes it"] * 3


def test_a_model_folder_without_a_config(ready, tmp_path):
    (tmp_path / "model" / "config.json").unlink()
    assert "the model folder ./model has no config.json" in problems_of(ready())


@pytest.mark.parametrize("key", ["model.name_or_path", "data.path"])
def test_what_is_on_the_hub_needs_a_cache_or_a_network(ready, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    recipe = ready(f"{key}=owner/name")
    shown = problems_of(recipe)
    assert "owner/name is not in the hub's cache, and cannot be fetched: no answer from http" in shown
    assert f"command line: {key}=owner/name" in shown and "hf download" in shown
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline by choice" in problems_of(recipe)
    kind = "models" if key.startswith("model") else "datasets"
    repo = tmp_path / "hf" / "hub" / f"{kind}--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (repo / "snapshots" / "abc" / file).write_text("{}")
    check_inputs(recipe, 1)


def test_a_batch_that_the_ranks_cannot_share(ready):
    shown = problems_of(ready(), 8)
    assert "train.global_batch=16 is not divisible by train.micro_batch=4 x 8 ranks" in shown
    assert "train.global_batch=32, or train.micro_batch= one of 1, 2" in shown
    shown = problems_of(ready(), 3)
    assert "fix: train.global_batch=12 or 24\n" in shown + "\n"


def test_a_missing_task_folder_and_all_problems_at_once(ready):
    overrides = ["eval.include_path=tasks", "data.path=x.jsonl", "deepspeed.config=z"]
    recipe = ready(*overrides, "model.name_or_path=./x")
    shown = problems_of(recipe, 3)
    assert "5 problems" in shown and "no task folder tasks" in shown
    assert "command line: eval.include_path=tasks" in shown


def test_a_run_folder_that_is_not_empty(ready, tmp_path):
    recipe = ready("output_dir=run")
    check_output_dir(recipe)
    (tmp_path / "run").mkdir()
    check_output_dir(recipe)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"run is not empty(.|\n)*output_dir=run-2(.|\n)*rm -r run"):
        check_output_dir(recipe)


def test_rows_longer_than_the_model_has_positions(ready, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 512}')
    check_inputs(ready("data.max_length=512"), 1)
    shown = problems_of(ready("data.max_length=513"))
    assert "data.max_length=513 is more than the 512 positions of the model" in shown
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json" in problems_of(ready())


def test_a_scorer_that_is_not_there(ready):
    shown = problems_of(ready("data.select=ifd", "data.select_rows=1", "data.scorer=/nowhere/small"))
    assert "no model folder /nowhere/small" in shown and "type data.scorer=/the/right/path" in shown
