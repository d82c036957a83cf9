"""The dtype of the base's weights, where `model.dtype: auto` leaves it to the hardware."""

from __future__ import annotations

import math
import platform
import time

import torch

from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0

SIDE = 384  # of the matrices that are multiplied to time it


def multiplies_bfloat16(device: str) -> bool:
    """Whether this machine has instructions that multiply bfloat16.

    Where it has none, a bfloat16 product is emulated: on an AVX2 CPU it takes 3 to 37 times an fp32 one.

    Args:
        device: `cuda` (the current GPU) or `cpu`. A CPU's answer heeds ONEDNN_MAX_CPU_ISA.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # For oneDNN, AVX-512 alone is support, too, but it emulates bfloat16 there.
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()


def bfloat16_cost() -> float:
    """How many times as long as in float32 a matrix product in bfloat16 takes on this CPU: measured now."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, best = torch.full((SIDE, SIDE), 1.0, dtype=dtype), math.inf
        for _ in range(3):  # the first one prepares its code
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) / seconds(torch.float32)


def resolve_dtype(recipe: Recipe, multiplies: bool, recorded: str | None = None) -> Recipe:
    """The recipe with `bfloat16` or `float32` for `auto`; any other recipe as it is.

    Args:
        multiplies: whether all hardware that the recipe runs on multiplies bfloat16.
        recorded: dtype of the run that is resumed, which it keeps wherever it goes on; None: of a new run.
    """
    if recipe.model.dtype != "auto":
        return recipe
    dtype = recorded or ("bfloat16" if multiplies else "float32")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def agree_on_dtype(recipe: Recipe, recorded: str | None = None) -> Recipe:
    """The recipe with its dtype resolved, alike on all ranks, which all call this; rank 0 says what it is.

    One rank without the instructions decides for all: in every step the others wait for the slowest.

    Args:
        recorded: see `resolve_dtype`.
    """
    device = collectives.device().type
    multiplies = all(collectives.all_gather_objects(multiplies_bfloat16(device)))
    resolved = resolve_dtype(recipe, multiplies, recorded)
    dtype, hardware = resolved.model.dtype, "GPU" if device == "cuda" else "CPU"
    if dtype != recipe.model.dtype:
        has = "multiplies" if multiplies else "does not multiply"
        why = "as this run began" if recorded else f"the {hardware} {has} bfloat16 in hardware"
        log_rank0(f"model.dtype=auto: {dtype}, {why}")
    if dtype == "bfloat16" and not multiplies:
        cost = f"{bfloat16_cost():.2g}" if device == "cpu" else "many"
        log_rank0(f"warning: this {hardware} emulates bfloat16: {cost} times slower than model.dtype=float32")
    return resolved
