"""Low-rank matrices beside frozen linears, by PEFT: LoRA, rsLoRA, PiSSA and DoRA in a sharded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from speft_ds.comm import collectives
from speft_ds.errors import UserError
from speft_ds.model.kinds import find_weights, parameter
from speft_ds.model.kinds.parameter import ParameterTarget
from speft_ds.model.kinds.target import Target
from speft_ds.model.targets import find_targets, shorten, tied_targets
from speft_ds.zero.shards import full_shape, is_sharded, shard_of

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"  # PEFT's name of it, a part of the parameters' names


@dataclass(frozen=True)
class LowRank:
    """What PEFT put into a model.

    Attributes:
        config: PEFT's.
        scaling: factor of the product B A.
        targets: name of a parameter -> A [rank, in], B [out, rank], and DoRA's magnitudes [out].
        start: of PiSSA, whose residual lacks their product: name -> this rank's shard as it was at first.
    """

    config: LoraConfig
    scaling: float
    targets: dict[str, Target]
    start: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        return sum(target.numel for target in self.targets.values())

    def gather_start(self) -> dict[str, Tensor]:
        """The matrices of PiSSA's start, complete, on rank 0 and in host memory; the others get none."""
        gathered = {}
        for name, own in self.start.items():
            shards = collectives.gather(own.to(collectives.device()), 0)
            if shards is not None:
                shape = full_shape(self.targets[name].weight)
                gathered[name] = shards.view(-1)[: shape.numel()].view(shape).cpu()
        return gathered


def find_linears(model: nn.Module, patterns: list[str] | None) -> tuple[dict[str, Target], list[str]]:
    """The plain linears that a low-rank matrix may go beside, and the other weights of the decoder layers.

    Args:
        patterns: as `find_targets` takes them.
    Raises:
        UserError: the patterns name a weight that is none, or there is none.
    """
    found = find_targets(model, patterns, where="method.targets")
    linears = plain_linears(model, found)
    others = [name for name in found if name not in linears]
    if others and (patterns is not None or not linears):
        what = f"a low-rank matrix goes beside a plain linear, which {shorten(others)} is not"
        raise UserError(what, "method.targets", "leave it out, or method.name=sparse")
    return linears, others


def plain_linears(model: nn.Module, targets: dict[str, Target]) -> dict[str, Target]:
    """Those of the targets that are `nn.Linear`, and neither the output head nor tied."""
    head, tied = model.get_output_embeddings(), set(tied_targets(model, targets))
    return {
        name: target
        for name, target in targets.items()
        if type(target.module) is nn.Linear and target.module is not head and name not in tied
    }


def has_low_rank(model: nn.Module) -> bool:
    """Whether PEFT's modules are in a model."""
    return hasattr(model, "peft_config")


def num_elements(linears: dict[str, Target], rank: int) -> int:
    """Of the matrices of this rank beside linears."""
    return rank * sum(sum(target.shape) for target in linears.values())


def matrix_sizes(linears: dict[str, Target], rank: int, method: str) -> dict[str, int]:
    """Name of a parameter -> its elements, of what a method puts beside linears."""
    sizes = {}
    for name, target in linears.items():
        module, (rows, columns) = name.removesuffix(".weight"), target.shape
        sizes[f"{module}.lora_A.{ADAPTER}.weight"] = rank * columns
        sizes[f"{module}.lora_B.{ADAPTER}.weight"] = rows * rank
        if method == "dora":
            sizes[f"{module}.lora_magnitude_vector.{ADAPTER}.weight"] = rows
    return sizes


def rank_within(linears: dict[str, Target], budget: float) -> int:
    """The largest rank whose matrices have at most `budget` elements together; 1 at least."""
    return max(1, int(budget // num_elements(linears, 1)))


@torch.no_grad()
def add_low_rank(
    model: nn.Module,
    linears: dict[str, Target],
    method: str,
    rank: int,
    alpha: float,
    seed: int,
    ds_config: dict,
) -> LowRank:
    """Put PEFT's modules beside linears, sharded and frozen as all else; all ranks call this together.

    PEFT makes the matrices of a weight that it gathers: of PiSSA by its singular values, which the weight
    lacks from then on; of DoRA the magnitudes.

    Args:
        model: frozen, sharded, on no engine yet; the linears get another module around them.
        method: `lora`, `rslora`, `pissa` or `dora`.
        seed: of the matrices, which are the same at every world size.
        ds_config: the complete DeepSpeed configuration.
    Raises:
        UserError: PiSSA is to have more singular values than a weight has.
    """
    from peft import LoraConfig, inject_adapter_in_model  # late: an extra of the package
    from transformers.integrations import HfDeepSpeedConfig

    name, most = min(
        ((name, min(target.shape)) for name, target in linears.items()), key=lambda pair: pair[1]
    )
    if method == "pissa" and rank > most:
        what = f"{name} has {most} singular values, fewer than the rank"
        raise UserError(what, "method.rank", f"method.rank={most}")
    modules = [name.removesuffix(".weight") for name in linears]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        use_rslora=method == "rslora",
        use_dora=method == "dora",
        init_lora_weights="pissa" if method == "pissa" else True,
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else "SEQ_CLS",
    )
    sharded = next(model.parameters())
    alive = HfDeepSpeedConfig(ds_config)  # by which PEFT knows that weights have to be gathered
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    del alive
    model.requires_grad_(False)
    sharded.convert_to_zero_parameters([p for p in model.parameters() if not is_sharded(p)])
    targets, scaling = {}, 1.0
    for name in modules:
        layer = model.get_submodule(name)
        targets |= _targets_of(layer, name)
        scaling = layer.scaling[ADAPTER]
    start = {n: shard_of(t.weight).clone() for n, t in targets.items()} if method == "pissa" else {}
    return LowRank(config, scaling, targets, start)


def _targets_of(layer: nn.Module, name: str) -> dict[str, Target]:
    """What is trained of one of PEFT's layers, by the name of its parameter."""
    found: dict[str, Target] = {}
    for part in ("lora_A", "lora_B"):
        matrix = getattr(layer, part)[ADAPTER]
        found[f"{name}.{part}.{ADAPTER}.weight"] = find_weights(matrix)["weight"]
    if ADAPTER in layer.lora_magnitude_vector:
        import deepspeed

        magnitude = layer.lora_magnitude_vector[ADAPTER]
        target = ParameterTarget(magnitude, "weight", parameter)
        found[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"] = target
        # Its forward takes the norm of the linear's weight, which is gathered for the linear alone otherwise.
        deepspeed.zero.register_external_parameter(magnitude, layer.base_layer.weight)
    return found
