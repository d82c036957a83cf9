"""Models that are refused, and lengths that are limited, by config.json alone."""

import json

import pytest

from speft_ds.config.check_model import model_problems, num_positions
from speft_ds.config.recipe import Recipe


@pytest.fixture
def problems(tmp_path):
    def found(config, trains=True, length=64):
        file = tmp_path / "config.json"
        file.write_text(config if isinstance(config, str) else json.dumps(config))
        values = {"model": {"name_or_path": str(tmp_path)}, "data": {"max_length": length}}
        return model_problems(Recipe.model_validate(values), file, trains)

    return found


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, ["fp8"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ["4", "nf4"]),
        ({"quant_method": "gptq", "bits": 4}, ["gptq", "4"]),
        ({"quant_method": "mxfp4"}, ["mxfp4"]),
        ("unknown", []),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_a_quantised_checkpoint_is_refused_by_its_kind(problems, section, words, trains):
    (problem,) = problems({"quantization_config": section}, trains)
    assert "model.name_or_path" in problem.where and all(word in problem.what for word in words)
    assert "model.base_format=nf4" in problem.fix


def test_attention_that_is_not_installed(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    model = {"name_or_path": str(tmp_path), "attention": "flash_attention_3"}
    (problem,) = model_problems(Recipe.model_validate({"model": model}), file, True)
    assert "model.attention" in problem.where and "model.attention=auto" in problem.fix


@pytest.mark.parametrize(
    "config",
    [
        {"is_encoder_decoder": True},
        {"model_type": "somebodys_own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}},
        "[]",
        "{",
        "[" * 100_000,
        {"num_hidden_layers": 10**7},  # nobody would wait for that
        {"text_config": {"num_hidden_layers": float("nan")}},
    ],
)
def test_what_is_no_causal_model_of_transformers(problems, config):
    (problem,) = problems(config)
    assert problem.where and problem.fix


def test_an_adapter_in_the_models_folder_is_refused(problems, tmp_path):
    """transformers loads the base that it names, wherever that is, in place of the model."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    (problem,) = problems({})
    assert problem.where == str(tmp_path) and "adapter_config.json" in problem.fix


def test_code_beside_a_known_type_is_not_needed(problems):
    assert problems({"model_type": "llama", "auto_map": {"AutoConfig": "configuration.Llama"}}) == []


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 32},
        {"n_positions": 32},
        {"max_seq_len": 32},
        {"text_config": {"max_position_embeddings": 32}},
        {"text_config": None, "llm_config": {"n_positions": 32}},
    ],
)
def test_rows_are_no_longer_than_the_positions_by_any_name(problems, config):
    assert num_positions(config) == 32
    (problem,) = problems(config)
    assert "data.max_length" in problem.where and "data.max_length=32" in problem.fix
    assert problems(config, length=32) == problems(config, trains=False) == []


@pytest.mark.parametrize("config", [{}, {"n_positions": 0}, {"n_positions": True}, {"n_positions": "32"}])
def test_a_configuration_may_not_say(problems, config):
    assert num_positions(config) is None and problems(config) == []
