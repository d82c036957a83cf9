"""Weights that may be trained: which there are, and in which decoder layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from torch import nn

from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError
from speft_ds.model.kinds import find_weights, parameter
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.kinds.quantised import QuantisedLinear, QuantisedTarget
from speft_ds.model.kinds.target import Target
from speft_ds.zero.shards import full_shape

# What some weights have in one matrix, by the last part of their name; in what order differs by family.
FUSED = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "qkv", "c_attn"), ("q", "k", "v")),
    **dict.fromkeys(("gate_up_proj", "input_linear"), ("gate", "up")),
}


def all_weights(model: nn.Module) -> dict[str, Target]:
    """Every weight of a kind that may be trained, by name, in model order; a classifier's head left out."""
    found = {}
    for name, module in model.named_modules():
        for attribute, target in find_weights(module).items():
            found[f"{name}.{attribute}"] = target
    found.pop(HEAD, None)
    return found


def without_wrapper(name: str) -> str:
    """The name of a weight before a low-rank matrix was put beside it, which has the linear in a module."""
    return re.sub(r"\.base_layer(\.|$)", r"\1", name)


def weight_elements(model: nn.Module) -> dict[str, int]:
    """Weight -> its elements, of all weights; of one in few bits, those of the weight that it stands for."""
    elements = {}
    for prefix, module in model.named_modules():
        prefix = without_wrapper(prefix)
        in_few_bits = isinstance(module, QuantisedLinear)
        if in_few_bits:
            elements[f"{prefix}.weight"] = module.out_features * module.in_features
        for name, weight in module.named_parameters(prefix, recurse=False):
            if not in_few_bits or name.endswith(".bias"):
                elements.setdefault(name, full_shape(weight).numel())
    return elements


def find_targets(
    model: nn.Module,
    patterns: list[str] | None,
    layers: list[int] | None = None,
    where: str = "mask.targets",
) -> dict[str, Target]:
    """The weights that may be trained, by name, in model order.

    Args:
        patterns: shell patterns on the weight's name without `.weight`, or on its last part (`q_proj`,
            `*.mlp.*`, `gate_up_proj`); None stands for all of the decoder layers, that is, inside a
            `ModuleList`.
        layers: first and last decoder layer, both included, to restrict to; None: all.
        where: the key that names the patterns.
    Raises:
        UserError: a pattern, the default or the range matches nothing.
    """
    weights = all_weights(model)
    if patterns is None:
        found = {name: target for name, target in weights.items() if layer_number(name) is not None}
        unmatched = [] if found else ["a layer of the decoder"]
    else:
        matches = _matching(weights, patterns)
        unmatched = [pattern for pattern, names in matches.items() if not names]
        wanted = {name for names in matches.values() for name in names}
        found = {name: target for name, target in weights.items() if name in wanted}
    if unmatched:
        known = sorted({name.removesuffix(".weight").split(".")[-1] for name in weights})
        named = ", ".join(fused_parts(name) for name in known) or "(it has none)"
        what, fix = (
            f"no weight matches {', '.join(unmatched)}",
            "this model's weights that may be trained are named",
        )
        raise UserError(what, where, f"{fix}: {named}")
    return found if layers is None else in_layers(found, layers)


def find_whole(model: nn.Module, patterns: list[str] | None, where: str = "mask.dense") -> dict[str, Target]:
    """The weights that are to be trained whole, by name, in model order; a classifier's head left out.

    Args:
        patterns: as `find_targets` takes them, on any parameter (`embed_tokens`, `*layernorm`, `*.bias`);
            None: all.
        where: the key that names the patterns.
    Raises:
        UserError: a pattern matches nothing, the head alone of a weight that it shares with the embedding,
            or a weight in few bits.
    """
    found = _parameters(model)
    wanted = set(found)
    if patterns is not None:
        matches = _matching(found, patterns)
        if unmatched := [pattern for pattern, names in matches.items() if not names]:
            known = ", ".join(sorted({name.removesuffix(".weight").split(".")[-1] for name in found}))
            what, fix = f"no parameter matches {', '.join(unmatched)}", f"this model has {known}"
            raise UserError(what, where, fix)
        wanted = {name for names in matches.values() for name in names}
    first: dict[int, str] = {}  # of the names that share a weight
    for name, target in found.items():
        first.setdefault(id(target.weight), name)
    chosen = {}
    for name, target in found.items():
        shared = first[id(target.weight)]
        if name in wanted and shared not in wanted:
            what, short = f"{name} shares its weight with {shared}", shared.removesuffix(".weight")
            raise UserError(what, where, f"name {short.split('.')[-1]}, too: they are trained together")
        if name in wanted and isinstance(target, QuantisedTarget):
            raise UserError(f"{name} is in few bits", where, "model.base_format=null, or leave it out")
        if name in wanted and name == shared:
            chosen[name] = target
    return chosen


def _parameters(model: nn.Module) -> dict[str, Target]:
    """Every parameter by name, in model order, one that modules share by each of them."""
    head, found = model.get_output_embeddings(), {}
    for prefix, module in model.named_modules():
        # The loss is made of the head's weight itself.
        products = {} if module is head else find_weights(module)
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, QuantisedLinear):
            names = [*products, *(name for name in names if name == "bias")]
        for name in names:
            target = products.get(name) or ParameterTarget(module, name, parameter)
            found[f"{prefix}.{name}"] = target
    found.pop(HEAD, None)
    return found


def _matching(names: Iterable[str], patterns: list[str]) -> dict[str, list[str]]:
    """Pattern -> the names that it matches, without `.weight`, in full or by their last part."""
    short = {name: name.removesuffix(".weight") for name in names}
    return {
        p: [n for n, s in short.items() if fnmatch(s, p) or fnmatch(s.split(".")[-1], p)] for p in patterns
    }


def fused_parts(name: str) -> str:
    """The name of a weight with its parts, where it has several: `qkv_proj (q, k, v)`."""
    parts = FUSED.get(name.split(".")[-1])
    return f"{name} ({', '.join(parts)})" if parts else name


def in_layers(targets: dict[str, Target], layers: list[int]) -> dict[str, Target]:
    """Those of the decoder layers from the first to the last of `layers`."""
    numbers = sorted({number for name in targets if (number := layer_number(name)) is not None})
    if not numbers or not numbers[0] <= layers[0] <= layers[1] <= numbers[-1]:
        there = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
        raise UserError(
            f"layers {layers[0]} to {layers[1]} are asked for; the targets are in layers: {there}",
            where="mask.layers",
            fix=f"mask.layers=[{numbers[0]}, {numbers[-1]}], or less" if numbers else "mask.layers=null",
        )
    return {name: t for name, t in targets.items() if layer_number(name) in range(layers[0], layers[1] + 1)}


def layer_number(name: str) -> int | None:
    """The decoder layer that a module or weight name is in: its first number. None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def target_shapes(targets: dict[str, Target]) -> dict[str, tuple[int, int]]:
    """Weight name -> (rows, columns), whether or not the weights are gathered."""
    return {name: target.shape for name, target in targets.items()}


def tied_targets(model: nn.Module, targets: dict[str, Target]) -> list[str]:
    """Targets whose weight another module shares; training them would also change that module."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners[id(weight)] = owners.get(id(weight), 0) + 1
    return [name for name, target in targets.items() if owners.get(id(target.weight), 0) > 1]


def place(name: str) -> tuple[int | None, str]:
    """(layer, module) of a weight.

    `model.layers.3.mlp.experts.7.up_proj.weight` -> (3, `mlp.experts.*.up_proj`). The layer is the first
    number in the name, None where there is none; later ones become `*`, so that the experts of a layer
    share one place.
    """
    parts = name.removesuffix(".weight").split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return None, ".".join(parts)
    module = parts[numbers[0] + 1 :] or parts
    return int(parts[numbers[0]]), ".".join("*" if part.isdecimal() else part for part in module)


def shorten(names: list[str], most: int = 4) -> str:
    """The first of some weights' names, numbers as `*`, and how many more there are."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in names))
    return ", ".join(patterns[:most]) + (f" and {len(patterns) - most} more" if len(patterns) > most else "")
