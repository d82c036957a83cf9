"""A model that is scored as if its linears computed in few bits: weights and inputs go through a codec.

The arithmetic stays that of the model's dtype; what is lost is what the format does not hold. Embeddings, the
head, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from speft_ds.evaluation.eval_jobs import LowBits
from speft_ds.model.codecs import codec
from speft_ds.model.kinds import conv1d, experts
from speft_ds.model.kinds.target import Target
from speft_ds.model.targets import find_targets, shorten
from speft_ds.zero.shards import changing_shards, full_shape, own_elements


@torch.no_grad()
def round_weights(module: nn.Module, name: str) -> None:
    """Replace the weights of the decoder's linears by what a format makes of them, each rank in its shards.

    Every rank enters this together. Blocks lie along the inputs, however the weight is stored.

    Args:
        module: the engine's.
        name: of the format.
    """
    import deepspeed

    for target in linears(module).values():
        weight = target.weight
        with deepspeed.zero.GatheredParameters([weight]):
            transposed = weight.transpose(-2, -1) if _has_inputs_in_rows(target) else weight
            rounded = codec(name).round_trip(transposed)
        if _has_inputs_in_rows(target):
            rounded = rounded.transpose(-2, -1)
        with changing_shards([weight]):
            shard, start = own_elements(weight)
            shard.copy_(rounded.reshape(-1)[start : start + shard.numel()])


@contextmanager
def rounded_inputs(model: nn.Module, name: str | None) -> Iterator[None]:
    """Meanwhile, the decoder's linears get what a format makes of their inputs; None: the inputs themselves.

    Those of experts, which one module holds, are not seen from outside and stay as they are.
    """
    if name is None:
        yield
        return

    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # What is not finite stays so: looking for it would stop the device at every linear.
        return codec(name).round_trip(inputs[0], check=False), *inputs[1:]

    targets = [target for target in linears(model).values() if target.kind is not experts]
    hooks = [target.module.register_forward_pre_hook(rounded) for target in targets]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def low_bits_notes(model: nn.Module, low_bits: LowBits) -> list[str]:
    """What is scored in which format, and what is not."""
    if not low_bits.facts:
        return []
    chosen, notes = linears(model), []
    if low_bits.weights:
        numel = sum(target.numel for target in chosen.values())
        share = numel / sum(full_shape(weight).numel() for weight in model.parameters())
        what = f"weights in {_in_words(low_bits.weights)}: {len(chosen)} linears of the decoder"
        left = [name for name, weight in model.named_parameters() if len(full_shape(weight)) > 1]
        left = shorten([name for name in left if name not in chosen and not name.endswith("bias")])
        notes.append(f"{what}, {share:.1%} of the model's elements; as they are: {left or 'vectors'}")
    if low_bits.activations:
        seen = [name for name, target in chosen.items() if target.kind is not experts]
        more = "" if len(seen) == len(chosen) else ", but not those of experts"
        what = f"inputs in {_in_words(low_bits.activations)}: those of {len(seen)} linears of the decoder"
        notes.append(what + more)
    return notes


def linears(model: nn.Module) -> dict[str, Target]:
    """The decoder's weights that multiply inputs, by name, but for experts stored in an unknown order."""
    targets = find_targets(model, None).items()
    return {name: each for name, each in targets if _has_inputs_in_rows(each) is not None}


def _has_inputs_in_rows(target: Target) -> bool | None:
    """Whether a weight is stored [in, out]; None: not known."""
    if target.kind is experts:
        return getattr(target.module, "is_transposed", None)  # as transformers marks them
    return target.kind is conv1d


def _in_words(name: str) -> str:
    return f"{name} ({codec(name).bits_per_weight:g} bits each)"
