"""The DeepSpeed configuration: the user's JSON file, and the keys that recipes own."""

import json
from pathlib import Path
from typing import Any

from speft_ds.config.load_recipe import ROOT, shown
from speft_ds.config.recipe import Recipe
from speft_ds.config.train_config import divisors
from speft_ds.errors import RecipeError, UserError, did_you_mean
from speft_ds.io import read_json

DS_CONFIGS_DIR = ROOT / "ds_configs"
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "optimizer": "optimizer.name, optimizer.lr and so on",
    "scheduler": "optimizer.schedule and optimizer.warmup_steps",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",  # DeepSpeed's older name
    "fp16": "model.dtype",
    "timers": "train.profile",
    "gradient_clipping": "optimizer.clip_norm",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "train.monitor"),
}


def load_ds_config(recipe: Recipe, world_size: int, trains: bool = True) -> dict[str, Any]:
    """The DeepSpeed configuration: the named JSON file and what the recipe owns.

    A job that takes no steps (`trains=False`) has a batch of one row per rank.
    Raises RecipeError: all that is wrong with the file and with the batch.
    """
    config, problems = read_ds_config(recipe)
    problems += batch_problems(recipe, world_size) if trains else []
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")
    batch, micro = (recipe.train.global_batch, recipe.train.micro_batch) if trains else (world_size, 1)
    return {
        "steps_per_print": 1_000_000_000,  # the training loop prints its own line
        **config,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * world_size),
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "timers": {"throughput": {"enabled": False}},  # which waits for the device twice per micro-batch
        # DeepSpeed's own linear rounds before it adds the bias: another model than the merged one.
        "zero_optimization": {**config["zero_optimization"], "memory_efficient_linear": False},
    }


def read_ds_config(recipe: Recipe) -> tuple[dict[str, Any], list[UserError]]:
    """The named JSON file as it stands, and what is wrong with it."""
    name, where = recipe.deepspeed.config, recipe.where("deepspeed.config")
    is_path = name.endswith(".json") or "/" in name
    path = Path(name) if is_path else DS_CONFIGS_DIR / f"{name}.json"
    if not path.is_file():
        names = sorted(p.stem for p in DS_CONFIGS_DIR.glob("*.json"))
        return {}, [UserError(f"no DeepSpeed config {name}", where, did_you_mean(name, names))]
    file = shown(path)
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        fix = "JSON has no comments and no trailing commas"
        return {}, [UserError(f"not readable as JSON: {error}", file, fix)]
    if not isinstance(config, dict):
        return {}, [UserError("a DeepSpeed config is one JSON object", file, "put its keys in { ... }")]
    problems = [
        UserError(f"the recipe owns {key}", f"{file} ({key})", f"remove it, and set {OWNED[key]}")
        for key in config
        if key in OWNED
    ]
    return config, problems + _zero_problems(config.get("zero_optimization"), file)


def _zero_problems(zero: Any, file: str) -> list[UserError]:
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        fix = 'write "zero_optimization": {"stage": 3, ...}'
        return [UserError("only ZeRO stage 3 is supported", f"{file} (zero_optimization)", fix)]
    not_supported = ("is not supported yet", "remove it")
    refused = {  # key -> its values that are fine, and what is wrong with others
        "zero_quantized_weights": ((None, False), *not_supported),
        "zero_quantized_nontrainable_weights": ((None, False), *not_supported),
        "zero_hpz_partition_size": ((None, 1), *not_supported),
        "memory_efficient_linear": (
            (None, False),
            "rounds before it adds a bias, so the trained model would not be the merged one",
            "remove it",
        ),
        "offload_param": (
            (None, "none", "cpu"),
            "is not supported: every step writes to the shards, which must be in memory",
            'write "offload_param": {"device": "cpu", "pin_memory": true}',
        ),
        "offload_optimizer": (
            (None, "none"),
            "has no effect: DeepSpeed's optimizer is not used",
            "remove it; optimizer.name=adamw_8bit takes a quarter of the memory",
        ),
    }
    problems = []
    for key, (fine, what, fix) in refused.items():
        value = zero.get(key)
        if (value.get("device") if isinstance(value, dict) else value) not in fine:
            where = f"{file} (zero_optimization.{key})"
            problems.append(UserError(f"{key}: {json.dumps(value)} {what}", where, fix))
    return problems


def batch_problems(recipe: Recipe, world_size: int) -> list[UserError]:
    """What is wrong with sharing the global batch among this many ranks."""
    batch, micro = recipe.train.global_batch, recipe.train.micro_batch
    rows = micro * world_size
    if batch % rows == 0:
        return []
    what = f"train.global_batch={batch} is not divisible by train.micro_batch={micro} x {world_size} ranks"
    below, above = batch // rows * rows, -(-batch // rows) * rows
    ways = [f"train.global_batch={' or '.join(str(b) for b in (below, above) if b)}"]
    if batch % world_size == 0:
        ways.append(f"train.micro_batch= one of {divisors(batch // world_size)}")
    return [UserError(what, recipe.where("train.global_batch"), ", or ".join(ways))]
