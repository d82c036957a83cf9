"""Weights that may be trained: which there are, and in which decoder layers."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn

from speft_ds.config.model_config import HEAD
from speft_ds.errors import UserError
from speft_ds.zero.shards import full_shape


def find_targets(
    model: nn.Module, patterns: list[str] | None, layers: list[int] | None = None
) -> dict[str, nn.Linear]:
    """The linears whose weights may be trained, by weight name, in model order.

    Args:
        patterns: shell patterns on the module name or its last part (`q_proj`, `*.mlp.*`); None stands
            for every `nn.Linear` of the decoder layers, that is, inside a `ModuleList`.
        layers: first and last decoder layer, both included, to restrict to; None: all.
    Raises:
        UserError: a pattern, the default or the range matches nothing.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" != HEAD
    }
    inside = {name: module for name, module in linears.items() if layer_number(name) is not None}
    if patterns is None:
        found, unmatched = inside, [] if inside else ["every nn.Linear of the decoder layers"]
    else:
        matches = {p: [n for n in linears if fnmatch(n, p) or fnmatch(n.split(".")[-1], p)] for p in patterns}
        unmatched = [pattern for pattern, names in matches.items() if not names]
        wanted = {name for names in matches.values() for name in names}
        found = {name: module for name, module in linears.items() if name in wanted}
    if unmatched:
        known = sorted({name.split(".")[-1] for name in linears})
        raise UserError(
            f"no linear layer matches {', '.join(unmatched)}",
            where="mask.targets",
            fix=f"this model's linear layers are named: {', '.join(known) or '(none: it has no nn.Linear)'}",
        )
    if layers is not None:
        found = in_layers(found, layers)
    return {f"{name}.weight": module for name, module in found.items()}


def in_layers(linears: dict[str, nn.Linear], layers: list[int]) -> dict[str, nn.Linear]:
    """Those of the decoder layers from the first to the last of `layers`."""
    numbers = sorted({number for name in linears if (number := layer_number(name)) is not None})
    if not numbers or not numbers[0] <= layers[0] <= layers[1] <= numbers[-1]:
        there = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
        raise UserError(
            f"layers {layers[0]} to {layers[1]} are asked for; the targets are in layers: {there}",
            where="mask.layers",
            fix=f"mask.layers=[{numbers[0]}, {numbers[-1]}], or less" if numbers else "mask.layers=null",
        )
    return {name: m for name, m in linears.items() if layer_number(name) in range(layers[0], layers[1] + 1)}


def layer_number(name: str) -> int | None:
    """The decoder layer that a module or weight name is in: its first number. None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def target_shapes(targets: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """Weight name -> (out, in), whether or not the weights are gathered."""
    return {name: tuple(full_shape(linear.weight)) for name, linear in targets.items()}


def tied_targets(model: nn.Module, targets: dict[str, nn.Linear]) -> list[str]:
    """Targets whose weight another module shares; training them would also change that module."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [name for name, linear in targets.items() if owners[id(linear.weight)] > 1]


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
