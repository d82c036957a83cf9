"""The DeepSpeed configuration: the user's JSON file, and the keys that recipes own."""

import json
import math
from pathlib import Path
from typing import Any

from speft_ds.config.load_recipe import DS_CONFIGS_DIR, shown
from speft_ds.config.recipe import Recipe
from speft_ds.config.section import divisors
from speft_ds.errors import RecipeError, UserError, did_you_mean

OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "optimizer": "optimizer.name, optimizer.lr and so on",
    "scheduler": "optimizer.schedule and optimizer.warmup_steps",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",  # DeepSpeed's older name
    "fp16": "model.dtype",
    "gradient_clipping": "optimizer.clip_norm",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "train.monitor"),
}


def load_ds_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration: the named JSON file and what the recipe owns. Raises RecipeError."""
    config, problems = read_ds_config(recipe)
    problems += batch_problems(recipe, world_size)
    if problems:
        raise RecipeError(problems, f"recipe {recipe.name}")
    train = recipe.train
    return {
        "steps_per_print": 1_000_000_000,  # the training loop prints its own line
        **config,
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * world_size),
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
    }


def read_ds_config(recipe: Recipe) -> tuple[dict[str, Any], list[UserError]]:
    """The named JSON file as it stands, and what is wrong with it."""
    name, where = recipe.deepspeed.config, recipe.where("deepspeed.config")
    is_path = name.endswith(".json") or "/" in name
    path = Path(name) if is_path else DS_CONFIGS_DIR / f"{name}.json"
    if not path.is_file():
        names = sorted(p.stem for p in DS_CONFIGS_DIR.glob("*.json"))
        return {}, [UserError(f"no DeepSpeed config {name}", where, did_you_mean(name, names))]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "JSON has no comments and no trailing commas"
        return {}, [UserError(f"not readable as JSON: {error}", shown(path), fix)]
    if not isinstance(config, dict):
        fix = "put its keys in { ... }"
        return {}, [UserError("a DeepSpeed config is one JSON object", shown(path), fix)]
    owned = [key for key in config if key in OWNED]
    problems = [
        UserError(f"the recipe owns {key}", f"{shown(path)} ({key})", f"remove it, and set {OWNED[key]}")
        for key in owned
    ]
    return config, problems + _zero_problems(config.get("zero_optimization"), shown(path))


def _zero_problems(zero: Any, file: str) -> list[UserError]:
    where = f"{file} (zero_optimization)"
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        fix = 'write "zero_optimization": {"stage": 3, ...}'
        return [UserError("only ZeRO stage 3 is supported", where, fix)]
    refused = {
        "zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "zero_quantized_nontrainable_weights": bool(zero.get("zero_quantized_nontrainable_weights")),
        "zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) != 1,
    }
    problems = [
        UserError(f"{key}: {json.dumps(zero[key])} is not supported yet", _at(file, key), "remove it")
        for key, is_set in refused.items()
        if is_set
    ]
    return problems + _offload_problems(zero, file)


def _offload_problems(zero: dict[str, Any], file: str) -> list[UserError]:
    devices = {
        key: zero[key].get("device", "none") if isinstance(zero.get(key), dict) else "none"
        for key in ("offload_param", "offload_optimizer")
    }
    problems = []
    if devices["offload_param"] == "nvme":
        what = (
            "offload_param to nvme is not supported: every step writes to the shards, which must be in memory"
        )
        fix = 'write "offload_param": {"device": "cpu", "pin_memory": true}'
        problems.append(UserError(what, _at(file, "offload_param"), fix))
    if devices["offload_optimizer"] != "none":
        what = "offload_optimizer has no effect: DeepSpeed's optimizer is not used"
        fix = "remove it; optimizer.name=paged_adamw_8bit is what gives way where a GPU is full"
        problems.append(UserError(what, _at(file, "offload_optimizer"), fix))
    return problems


def _at(file: str, key: str) -> str:
    return f"{file} (zero_optimization.{key})"


def shared_micro_batch(recipe: Recipe, world_size: int) -> int:
    """The recipe's micro-batch, or the largest that divides it and that this many ranks can share.

    Where the global batch cannot be shared at all, the recipe's own: see `batch_problems`.
    """
    rows, left_over = divmod(recipe.train.global_batch, world_size)
    micro_batch = recipe.train.micro_batch
    return micro_batch if left_over or not rows else math.gcd(micro_batch, rows)


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
