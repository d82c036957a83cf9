"""What a model is made of, from its configuration alone."""

import json

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError
from speft_ds.sparse.mask import Mask, save_mask
from speft_ds.tools.plan.geometry import list_geometries, read_geometry

# Weights as the checkpoints on the hub have them, tied ones once.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "facebook/opt-350m": 331_196_416,
    "google/gemma-2-2b": 2_614_341_888,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
}


def recipe_of(model, **sections) -> Recipe:
    name = {"name_or_path": str(model), "dtype": "float32"}
    return Recipe.model_validate({"model": name, "data": {"path": "rows.jsonl"}, **sections})


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No configuration that this machine happens to have fetched."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", sorted({*PUBLISHED, *list_geometries()}))
def test_built_in_geometries_have_the_published_size(name):
    geometry = read_geometry(recipe_of(name))
    assert geometry.num_weights == PUBLISHED[name]
    assert "geometries" in geometry.source


def test_a_density_of_channels_is_one_of_the_weights_that_have_some():
    geometry = read_geometry(recipe_of("meta-llama/Meta-Llama-3-8B", mask={"granularity": "channel"}))
    assert geometry.num_target_elements == 32 * 3 * 4096 * 14336
    assert geometry.num_entries == round(0.005 * geometry.num_target_elements)
    with pytest.raises(UserError) as caught:
        # A layer's key/value heads are eight.
        one = {"granularity": "head", "density": 0.12, "budget": "per_layer"}
        read_geometry(recipe_of("meta-llama/Meta-Llama-3-8B", mask=one))
    assert caught.value.where == "mask.density"


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_loaded_model(tmp_path, tied):
    folder = make_model(tmp_path / "model", tied=tied)
    geometry = read_geometry(recipe_of(folder, mask={"density": 0.1}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert geometry.numel == {name: weight.numel() for name, weight in model.named_parameters()}
    weights = dict(model.named_parameters())
    assert all(tuple(weights[name].shape) == shape for name, shape in geometry.targets.items())
    assert len(geometry.targets) == 14 and not any("lm_head" in name for name in geometry.targets)
    elements = sum(weights[name].numel() for name in geometry.targets)
    assert geometry.num_target_elements == elements
    assert geometry.num_entries == round(0.1 * elements)
    assert geometry.source == str(folder / "config.json")


def test_targets_layers_and_counts_are_the_recipes(tmp_path):
    folder = make_model(tmp_path / "model")
    mask = {"num_trainable": 60, "targets": ["q_proj", "up_proj"], "layers": [1, 1]}
    geometry = read_geometry(recipe_of(folder, mask=mask))
    assert sorted(geometry.targets) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert geometry.num_entries == 60 and geometry.largest_target == 53 * 35


def test_a_saved_mask_says_what_is_trained(tmp_path):
    folder, name = make_model(tmp_path / "model"), "model.layers.0.mlp.up_proj.weight"
    save_mask(tmp_path / "mask.safetensors", Mask({name: torch.tensor([3, 7, 9])}, {name: (53, 35)}), {})
    geometry = read_geometry(recipe_of(folder, mask={"load": str(tmp_path)}))
    assert geometry.targets == {name: (53, 35)} and geometry.num_entries == 3


def test_a_hub_model_is_taken_from_the_cache_before_the_built_in_one(tmp_path):
    repo, commit = tmp_path / "home" / "hub" / "models--meta-llama--Llama-2-7b-hf", "0" * 40
    config = make_model(tmp_path / "model") / "config.json"
    for file, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", config.read_text())):
        (repo / file).parent.mkdir(parents=True)
        (repo / file).write_text(text)
    geometry = read_geometry(recipe_of("meta-llama/Llama-2-7b-hf"))
    assert geometry.source == "the hub cache" and geometry.num_weights < 10**6


def test_what_cannot_be_planned_says_where_and_what_to_do(tmp_path):
    folder = make_model(tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    for name, sections, named in [
        ("someone/unknown", {}, ["someone/unknown", "hf download"]),
        (tmp_path, {}, ["no such type", str(tmp_path / "config.json")]),
        (folder, {"mask": {"targets": ["c_attn"]}}, ["c_attn", "mask.targets"]),
    ]:
        with pytest.raises(UserError) as refused:
            read_geometry(recipe_of(name, **sections))
        assert all(part in str(refused.value) for part in named) and refused.value.fix
