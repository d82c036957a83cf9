"""DeepSpeed's configuration: merged with the recipe, refused, not readable."""

import json

import pytest

from speft_ds.config.deepspeed_config import DS_CONFIGS_DIR, load_ds_config
from speft_ds.errors import RecipeError
from unit.written import problems_of


def test_ds_config_is_merged_with_what_the_recipe_owns(ready):
    config = load_ds_config(ready("train.global_batch=32", "model.dtype=float32"), 2)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["bf16"] == {"enabled": False}
    assert config["steps_per_print"] >= 10**9
    file = json.loads((DS_CONFIGS_DIR / "zero3_bf16.json").read_text())
    assert config["zero_optimization"] == {**file["zero_optimization"], "memory_efficient_linear": False}
    with pytest.raises(RecipeError, match=r"train\.global_batch"):
        load_ds_config(ready(), 3)
    config = load_ds_config(ready(), 3, trains=False)  # takes no steps, so any number of ranks will do
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (3, 1)


def test_the_given_configs_differ_in_overlap_and_offload_alone():
    gpu, cpu, offload = (
        json.loads((DS_CONFIGS_DIR / f"{name}.json").read_text())["zero_optimization"]
        for name in ("zero3_bf16", "zero3_cpu", "zero3_bf16_offload")
    )
    assert offload.pop("offload_param") == {"device": "cpu", "pin_memory": True} and offload == gpu
    assert (gpu.pop("overlap_comm"), cpu.pop("overlap_comm")) == (True, False)
    assert gpu == cpu and not any(isinstance(value, float) for value in gpu.values())


def test_steps_per_print_may_be_given(ready, tmp_path):
    (tmp_path / "ds.json").write_text('{"steps_per_print": 5, "zero_optimization": {"stage": 3}}')
    assert load_ds_config(ready("deepspeed.config=ds.json"), 1)["steps_per_print"] == 5


OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient_clipping": "optimizer.clip_norm",
    "wandb": "train.monitor",
}


@pytest.mark.parametrize("key", OWNED)
def test_keys_that_recipes_own_are_refused(ready, tmp_path, key):
    (tmp_path / "ds.json").write_text(json.dumps({key: 1, "zero_optimization": {"stage": 3}}))
    with pytest.raises(RecipeError) as caught:
        load_ds_config(ready("deepspeed.config=ds.json"), 1)
    (problem,) = caught.value.problems
    assert problem.where == f"ds.json ({key})" and OWNED[key] in problem.fix
    assert key == "wandb" or f"`{key}`" in (DS_CONFIGS_DIR / "README.md").read_text()


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        (None, ""),
        ({}, ""),
        ({"stage": 2}, ""),
        ({"stage": 3, "zero_quantized_weights": True}, ".zero_quantized_weights"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, ".zero_quantized_nontrainable_weights"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, ".zero_hpz_partition_size"),
        ({"stage": 3, "memory_efficient_linear": True}, ".memory_efficient_linear"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, ".offload_param"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, ".offload_optimizer"),
    ],
)
def test_zero_settings_that_are_refused(ready, tmp_path, zero, key):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(RecipeError) as caught:
        load_ds_config(ready("deepspeed.config=ds.json"), 1)
    (problem,) = caught.value.problems
    assert problem.where == f"ds.json (zero_optimization{key})" and problem.fix


def test_zero_settings_that_are_fine(ready, tmp_path):
    zero = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    zero["offload_param"], zero["offload_optimizer"] = {"device": "cpu"}, {"device": "none"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    load_ds_config(ready("deepspeed.config=ds.json"), 1)


@pytest.mark.parametrize("content", ["{,}", "[]", "\xff"])
def test_ds_configs_that_cannot_be_read(ready, tmp_path, content):
    (tmp_path / "ds.json").write_text(content, encoding="latin-1")
    (problem,) = problems_of(ready("deepspeed.config=ds.json"))
    assert problem.where == "ds.json" and problem.fix
