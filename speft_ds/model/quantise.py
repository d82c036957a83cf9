"""A sharded base in few bits: the linears of its decoder layers, weight by weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from speft_ds.comm import collectives
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.codecs import codec
from speft_ds.model.kinds.quantised import QuantisedLinear
from speft_ds.model.reach import reach_without_values
from speft_ds.model.targets import all_weights, layer_number, shorten, tied_targets
from speft_ds.zero.shards import full_shape, gathered, move_shard, own_elements, shard, shard_like


@torch.no_grad()
def quantise(model: nn.Module, base_format: str, ds_config: dict, keeps_original: bool = False) -> list[str]:
    """Store the plain linears of the decoder layers in few bits; all ranks call this together.

    One weight is gathered at a time. What a forward does not use as a linear alone, what is tied, and what is
    no plain linear (experts, embeddings, the head) stays as it is, and rank 0 says so.

    Args:
        model: frozen, on no engine yet, sharded by `load_config(ds_config)`.
        base_format: name of the codec.
        ds_config: the complete DeepSpeed configuration, of the engine to come.
        keeps_original: whether each rank keeps its part of the weights as they were, in host memory.
    Returns:
        The names of the weights, in model order.
    Raises:
        UserError: a weight is not finite, or there is no such linear.
    """
    names, left = plain_linears(model)
    first = shard(torch.zeros(1), ds_config)  # by which all others are cut
    for name in names:
        parent, _, own_name = name.removesuffix(".weight").rpartition(".")
        linear = getattr(model.get_submodule(parent), own_name)
        original = own_elements(linear.weight)[0].to("cpu", copy=True) if keeps_original else None
        with gathered(linear.weight):
            weight, make = linear.weight.data, partial(shard_like, first)
            try:
                quantised = QuantisedLinear(weight, linear.bias, codec(base_format), make)
            except UserError as error:
                raise UserError(f"{name}: {error.what}", "model.base_format", error.fix) from error
        quantised.original = original
        setattr(model.get_submodule(parent), own_name, quantised)
    if not _is_offloaded(ds_config):
        for weight in plain_parameters(model):
            move_shard(weight, collectives.device())
    _tell(model, base_format, names, left)
    return names


def load_config(ds_config: dict) -> dict:
    """The DeepSpeed configuration to load a base with that is to be put into few bits: in host memory.

    So a GPU never holds more of it than one weight.
    """
    zero = ds_config["zero_optimization"]
    offload = zero.get("offload_param") if _is_offloaded(ds_config) else {"device": "cpu"}
    return {**ds_config, "zero_optimization": {**zero, "offload_param": offload}}


def _is_offloaded(ds_config: dict) -> bool:
    return (ds_config["zero_optimization"].get("offload_param") or {}).get("device") == "cpu"


def plain_linears(model: nn.Module) -> tuple[list[str], list[str]]:
    """Weights of the decoder layers: those that can be stored in few bits, and the others.

    Args:
        model: sharded or not, or on the meta device.
    Raises:
        UserError: none can be.
    """
    weights = {n: target for n, target in all_weights(model).items() if layer_number(n) is not None}

    def same_model() -> nn.Module:
        return type(model)(copy.deepcopy(model.config)).to(model.dtype)

    reach = reach_without_values(same_model, list(weights))
    tied = set(tied_targets(model, weights))
    names = [
        name
        for name, target in weights.items()
        if type(target.module) is nn.Linear and name not in tied and (reach is None or name in reach.fed)
    ]
    if not names:
        what = f"{type(model).__name__} has no plain linear in its decoder layers to store in few bits"
        raise UserError(what, "model.base_format", "model.base_format=null")
    return names, [name for name in weights if name not in names]


def _tell(model: nn.Module, base_format: str, names: list[str], left: list[str]) -> None:
    numel = sum(all_weights(model)[name].numel for name in names)
    others = sum(full_shape(weight).numel() for weight in plain_parameters(model))
    dtype = str(model.dtype).removeprefix("torch.")
    text = f"base: {len(names)} weights, {numel / (numel + others):.1%} of the model's elements, in "
    text += f"{base_format}, {codec(base_format).bits_per_weight:.2f} bits each; all others in {dtype}"
    log_rank0(text + (f", of the decoder layers {shorten(left)}" if left else ""))


def quantised_linears(model: nn.Module) -> list[QuantisedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


def plain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are weights as they are: without codes, scales and values."""
    linears = quantised_linears(model)
    others = {id(part) for each in linears for part in (each.packed, each.scales, each.values)}
    return [weight for weight in model.parameters() if id(weight) not in others]


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block weights in few bits are complete ones, sharded: for what has to change all of them.

    The memory is that of a base that is not in few bits. All ranks enter this together.
    """
    linears = quantised_linears(model)
    for linear in linears:
        linear.dense = shard_like(linear.packed, linear.live_weight().view(-1))
    try:
        yield
    finally:
        for linear in linears:
            linear.dense = None
