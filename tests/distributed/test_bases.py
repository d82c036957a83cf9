"""Bases whose sharded load would not be the plain one, or of which a text forward uses a part."""

import json

import pytest
import torch
from families import SIZES, make_family
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from distributed import checks
from distributed.family_checks import check_family
from distributed.reference import make_recipe
from distributed.test_families import COPIES, ONE_STEP


@pytest.fixture
def recipe(tiny, tmp_path):
    def make(base, dtype="float32", folder="run", **sections):
        model = {"name_or_path": str(base), "dtype": dtype}
        return make_recipe(tiny, tmp_path / folder, model=model, **{**ONE_STEP, **sections})

    return make


def assert_one_model(ranks, recipe):
    (found, _) = ranks(2)(check_family, recipe=recipe)
    assert all(found[copy] for copy in COPIES), found
    return found


def test_weights_that_a_model_keeps_in_fp32(ranks, recipe, tmp_path):
    base = make_family(tmp_path / "base", "ernie4_5_moe")
    for text in ranks(2)(checks.check_refused, recipe=recipe(base, "bfloat16")):
        assert "mlp.gate" in text and "model.dtype=float32" in text
    assert_one_model(ranks, recipe(base))


def test_a_buffer_that_is_recast_keeps_the_value_of_the_file(ranks, recipe, tmp_path):
    base = make_family(tmp_path / "base", "zaya")
    stored = load_file(base / "model.safetensors")
    for name in [name for name in stored if name.endswith("balancing_biases")]:
        save_file({name: stored[name]}, base / "other.safetensors")  # which transformers does not read
        stored[name][:-1] = torch.rand(len(stored[name]) - 1)  # of more bits than bfloat16 has
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    assert_one_model(ranks, recipe(base, "bfloat16"))


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_beside_a_configuration_that_ties_it(ranks, recipe, tmp_path, differs):
    base = make_family(tmp_path / "base", "llama", tie_word_embeddings=True)
    stored = load_file(base / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    stored["lm_head.weight"] = head.roll(1, 0) if differs else head
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    assert_one_model(ranks, recipe(base))
    facts = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert facts["num_entries"] > 0


def test_a_vision_tower_is_no_target(ranks, recipe, tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    layers = ["sliding_attention", "full_attention"]
    text = {
        key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_types": layers}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=262,
        boi_token_index=260,
        eoi_token_index=261,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert assert_one_model(ranks, recipe(tmp_path / "base"))["coverage"] > 0.9
    facts = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert facts["shapes"] and not any("vision" in name for name in facts["shapes"])
    tower = {"targets": ["*vision_tower*"]}
    for text in ranks(2)(checks.check_refused, recipe=recipe(tmp_path / "base", folder="tower", mask=tower)):
        assert "vision_tower" in text and "mask.targets" in text


def test_what_fails_as_it_loads_sharded_is_an_error_of_the_model(ranks, recipe, tmp_path):
    base = make_family(tmp_path / "base", "marian")
    for text in ranks(2)(checks.check_refused, recipe=recipe(base)):
        assert "ValueError" in text and "model.name_or_path" in text and "docs/models.md" in text


def test_rows_on_both_sides_of_longropes_switch(ranks, recipe, tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 30}
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 17.0], "partial_rotary_factor": 1.0}
    rope = {"rope_parameters": rope | factors, "original_max_position_embeddings": 30}
    base = make_family(tmp_path / "base", "phi3", **rope)
    assert assert_one_model(ranks, recipe(base))["gradient_error"] < 1e-5, "of each row alone"
