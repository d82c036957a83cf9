"""The frozen base: loading under ZeRO-3, what is targeted, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.config.model_config import HEAD
from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError
from speft_ds.zero.shards import full_shape, is_sharded, own_elements

HASH_CHUNK = 2**20  # elements hashed at once, to bound the int64 temporaries
INTEGER_VIEW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def load_base(name_or_path: str, dtype: str, ds_config: dict, num_classes: int | None = None) -> nn.Module:
    """A frozen `transformers` model, sharded while it loads.

    Args:
        name_or_path: local folder or hub name.
        dtype: `float32` or `bfloat16`; the weights are cast to it.
        ds_config: the complete DeepSpeed configuration.
        num_classes: None for a causal language model; else it classifies, and its head is new: see `HEAD`.
    Raises:
        UserError: the checkpoint cannot be read, or lacks weights of the model.
    """
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    kind, options = transformers.AutoModelForCausalLM, {}
    if num_classes is not None:
        # Whatever head a checkpoint brings is for other classes.
        options = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
        kind = transformers.AutoModelForSequenceClassification
    # Must be alive while from_pretrained runs, or every rank loads the whole model.
    zero3 = HfDeepSpeedConfig(ds_config)
    try:
        model, info = kind.from_pretrained(
            name_or_path, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model: {error}",
            where="model.name_or_path",
            fix="give a folder with config.json and weights, or the name of a model on the hub",
        ) from error
    finally:
        del zero3
    if num_classes is not None:
        _check_head(model, name_or_path)
    for problem in ("missing_keys", "mismatched_keys"):
        odd = {key if isinstance(key, str) else key[0] for key in info[problem]}
        if odd := sorted(odd - ({HEAD} if num_classes is not None else set())):
            raise UserError(
                f"the checkpoint has {problem.replace('_', ' ')}: {odd[:5]}",
                where=f"model.name_or_path: {name_or_path}",
                fix="use a complete checkpoint of this architecture; training random weights is refused",
            )
    if not all(is_sharded(parameter) for parameter in model.parameters()):
        raise RuntimeError("the base was not sharded by ZeRO-3")
    model.requires_grad_(False)
    return model


def _check_head(model: nn.Module, name_or_path: str) -> None:
    head = getattr(model, HEAD.split(".")[0], None)
    if type(head) is not nn.Linear or head.bias is not None:
        raise UserError(
            f"{type(model).__name__} has no linear classification head {HEAD} without bias",
            where=f"model.name_or_path: {name_or_path}",
            fix="a decoder model, as Llama, OPT, Qwen, Gemma and Mistral are; or model.task=causal_lm",
        )


@torch.no_grad()
def fill_head(head: nn.Linear, std: float, seed: int) -> None:
    """Give a sharded classification head its starting values, the same at every world size.

    Args:
        std: standard deviation of the normal distribution they are drawn from.
    """
    shape = full_shape(head.weight)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(std).view(-1)
    own, start = own_elements(head.weight)
    own.copy_(values[start : start + own.numel()])


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


def check_shapes(recipe: Recipe, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a recipe that asks for more than its targets have.

    Args:
        shapes: weight name -> (out, in) of the targets.
    Raises:
        UserError: `mask.lift_rank` or `mask.gate_layers` is too large.
    """
    mask, smallest = recipe.mask, min(min(shape) for shape in shapes.values())
    if mask.salience == "lift" and mask.lift_rank >= smallest:
        raise UserError(
            f"an approximation of rank {mask.lift_rank} leaves a weight with {smallest} "
            "rows or columns as it is",
            where="mask.lift_rank",
            fix=f"mask.lift_rank={max(1, smallest // 2)}, or leave out small weights by mask.targets",
        )
    layers = {layer_number(name) for name in shapes} - {None}
    if mask.layer_gate == "sampled" and mask.gate_layers >= len(layers):
        raise UserError(
            f"a gate that opens {mask.gate_layers} of {len(layers)} layers shuts nothing",
            where="mask.gate_layers",
            fix=f"mask.gate_layers={max(1, len(layers) // 4)}, or mask.layer_gate=none",
        )


def tied_targets(model: nn.Module, targets: dict[str, nn.Linear]) -> list[str]:
    """Targets whose weight another module shares; training them would also change that module."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [name for name, linear in targets.items() if owners[id(linear.weight)] > 1]


def element_hash(values: Tensor, start: int) -> int:
    """Sum over elements of a mix of (bits, global flat index), modulo 2^64.

    A sum, so that the hashes of the shards of a weight add up to the hash of the weight.
    """
    total = 0
    bits = values.reshape(-1).view(INTEGER_VIEW[values.dtype])
    for offset in range(0, bits.numel(), HASH_CHUNK):
        chunk = bits[offset : offset + HASH_CHUNK].to(torch.int64)
        position = torch.arange(start + offset, start + offset + chunk.numel(), device=chunk.device)
        mixed = mix64(chunk * -0x61C8864680B583EB + position * 0x2545F4914F6CDD1D)
        total += int(mixed.sum())
    return total % 2**64


def mix64(value: Tensor) -> Tensor:
    """A bijective scrambling of 64-bit values, held as int64: the finaliser of splitmix64."""
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically, which would copy the sign bit down and lose bits in the xor.
    return (value >> bits) & (2 ** (64 - bits) - 1)


def fingerprint(model: nn.Module, rounded: torch.dtype | None = None) -> str:
    """Hash of all pretrained weights: names, shapes, dtypes, bits. The same for a sharded and a plain model.

    A classifier's head is left out: it is not pretrained.

    Args:
        rounded: hash the weights rounded to this dtype, so that one checkpoint has one hash whether it
            is loaded in this dtype or in a wider one.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name != HEAD}
    hashes = []
    for parameter in parameters.values():
        values, start = own_elements(parameter) if is_sharded(parameter) else (parameter.detach(), 0)
        hashes.append(element_hash(values if rounded is None else values.to(rounded), start))
    if any(is_sharded(parameter) for parameter in parameters.values()):
        hashes = [sum(column) % 2**64 for column in zip(*collectives.all_gather_objects(hashes), strict=True)]
    digest = hashlib.sha256()
    for (name, parameter), value in zip(parameters.items(), hashes, strict=True):
        dtype = rounded or parameter.dtype
        digest.update(f"{name} {tuple(full_shape(parameter))} {dtype} {value:016x}\n".encode())
    return digest.hexdigest()
