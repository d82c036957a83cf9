"""The `mask` section: which weights are trained, and when."""

import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from speft_ds.config.section import ConfigSection, InPlaceOf, Needs, broken_rule
from speft_ds.config.values import Count, FilePath, Index, PartialShare, Share, Text
from speft_ds.errors import UserError

MASK_FILE = "mask.safetensors"  # in the folder that `speft score` leaves

ScoredOnRows = Literal[
    "gradient", "snip", "force", "taylor_fo", "fisher", "grasp", "grad_low_magnitude", "wanda", "quant_error"
]
ScoredOnWeights = Literal["magnitude", "low_magnitude", "synflow", "random", "lift"]
NEEDS_DATA = frozenset(get_args(ScoredOnRows))
CHANGE_WEIGHTS = frozenset({"synflow", "grasp"})  # for a moment, all of them
_DROP_GROW = Needs("schedule", ("drop_grow",))
_SINGLE_ENTRIES = Needs("granularity", ("element",), why="tiles are confined as they are", even_if_given=True)
_NO_ROW_QUOTA = Needs("budget", ("global", "per_layer"), why="a row has its own entries", even_if_given=True)

_WITH_ZEROS = Needs("only_nonzero", (False,), why="columns are trained with their zeros", even_if_given=True)


class MaskConfig(ConfigSection):
    salience: Literal[ScoredOnRows, ScoredOnWeights] = "gradient"
    """how each weight is scored"""
    density: Share | None = 0.005
    """the fraction of the targets to train"""
    num_trainable: Annotated[Count | None, InPlaceOf("density")] = None
    """how many weights to train, in place of density"""
    granularity: Literal["element", "block", "row", "column", "head", "channel"] = "element"
    """what is chosen as one, a head or an MLP channel in all its weights; by the mean of its entries"""
    block_size: Annotated[int, Field(ge=2), Needs("granularity", ("block",))] = 16
    """rows and columns of a block; smaller at a weight's edges"""
    budget: Annotated[
        Literal["global", "per_layer", "per_row"],
        Needs("granularity", ("element",), ("per_row",), "a row quota counts single entries"),
    ] = "global"
    """one threshold for all weights, one for each weight, or for each of its rows"""
    only_nonzero: Annotated[
        bool, Needs("granularity", ("element",), (True,), "a tile is trained with its zeros")
    ] = False
    """choose no entry whose pretrained value is exactly 0: a pruned base stays as sparse"""
    compute: Annotated[Share | None, _SINGLE_ENTRIES, _NO_ROW_QUOTA, _WITH_ZEROS] = None
    """entries lie in few columns, with this share of the dense gradient's multiply-adds; null: anywhere"""
    targets: Annotated[list[Text], Field(min_length=1)] | None = None
    """module names or patterns; null: all linears of the decoder layers"""
    layers: Annotated[list[Index], Field(min_length=2, max_length=2)] | None = None
    """[first, last] decoder layers to choose from, both included; null: all"""
    dense: Annotated[list[Text], Field(min_length=1)] | None = None
    """parameters to train whole beside the mask, by name or pattern: embed_tokens, *layernorm, *.bias"""
    lift_rank: Annotated[Count, Needs("salience", ("lift",))] = 128
    """rank of the approximation that lift scores"""
    score_device: Literal["device", "host"] = "device"
    """where the fp32 scores are kept: 4 bytes per targeted weight, over the ranks"""
    calibration_samples: Count = 64
    """rows that the scores are computed from"""
    calibration_batch: Count = 4
    """rows per calibration micro-batch, fixed so that the mask does not depend on the ranks"""
    calibration_seed: Index | None = None
    """which rows are drawn; null: the recipe's seed"""
    calibration_path: FilePath | None = None
    """a file of rows to calibrate on; null: the training rows"""
    load: FilePath | None = None
    """a mask.safetensors of speft score, or its folder, trained as it is; null: score"""
    start: Literal["zero", "exact"] = "zero"
    """deltas start at 0, or as what the entries lost to model.base_format"""
    schedule: Annotated[
        Literal["static", "periodic", "drop_grow", "grad_topk"],
        Needs("granularity", ("element",), ("drop_grow",), "it drops and grows single entries"),
        Needs("budget", ("global", "per_layer"), ("drop_grow",), "it would not keep the rows' quotas"),
    ] = "static"
    """whether and how the mask, or what steps inside it, changes during training"""
    update_every: Annotated[Count, Needs("schedule", ("periodic", "drop_grow"))] = 100
    """steps between two changes of the mask"""
    drop_rate: Annotated[PartialShare, _DROP_GROW] = 0.2
    """the fraction of the entries dropped at the start"""
    drop_anneal: Annotated[Literal["linear", "cosine"], _DROP_GROW] = "linear"
    """how drop_rate goes to 0"""
    growth: Annotated[Literal["sft_ag", "sft_ma"], _DROP_GROW] = "sft_ag"
    """grow by accumulated gradients of candidates, or by SM3's momentum estimate"""
    growth_steps: Annotated[Count, _DROP_GROW, Needs("growth", ("sft_ag",))] = 5
    """the last steps before a change that sft_ag accumulates over"""
    topk_fraction: Annotated[Share, Needs("schedule", ("grad_topk",))] = 0.5
    """the fraction of the mask that steps"""
    layer_gate: Annotated[
        Literal["none", "sampled", "importance", "half"],
        Needs(
            "schedule",
            ("static", "periodic", "grad_topk"),
            ("sampled", "importance", "half"),
            "entries that the gate keeps still would be dropped for not changing",
        ),
    ] = "none"
    """train gate_layers layers at a time, all as likely or the important ones more; or half of the weights"""
    gate_every: Annotated[Count, Needs("layer_gate", ("sampled", "importance", "half"))] = 20
    """steps until the gate is drawn anew"""
    gate_layers: Annotated[Count, Needs("layer_gate", ("sampled", "importance"))] = 2
    """decoder layers that the gate opens"""

    @field_validator("compute")
    @classmethod
    def _has_room(cls, value: float | None, info: ValidationInfo) -> float | None:
        density = info.data.get("density")
        if value is not None and density is not None and value < density:
            message = f"mask.compute={value} has room for fewer entries than mask.density={density}"
            raise broken_rule(message, f"mask.compute={min(1.0, 20 * density):.3g}, or a lower mask.density")
        return value

    @field_validator("layers")
    @classmethod
    def _ascending(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            message = f"mask.layers is {value}: the first is after the last"
            raise broken_rule(message, f"mask.layers=[{value[1]},{value[0]}]")
        return value

    @field_validator("growth_steps")
    @classmethod
    def _growth_fits(cls, value: int, info: ValidationInfo) -> int:
        is_used = (info.data.get("schedule"), info.data.get("growth")) == ("drop_grow", "sft_ag")
        update_every = info.data.get("update_every", value)  # absent where it is itself wrong
        if is_used and value > update_every:
            message = f"mask.growth_steps={value} is more than mask.update_every={update_every}"
            fix = f"mask.growth_steps={update_every}, or mask.update_every={value} or more"
            raise broken_rule(message, fix)
        return value

    def update_every_within(self, steps: int) -> int | None:
        """An `update_every` that changes the mask in a run of so many steps; None where there is none."""
        every = max(1, steps // 5)
        if (self.schedule, self.growth) == ("drop_grow", "sft_ag"):
            every = max(every, self.growth_steps)
        return every if every < steps else None

    @property
    def of_units(self) -> bool:
        """Whether what is chosen as one lies in several weights."""
        return self.granularity in ("head", "channel")

    @property
    def is_scored(self) -> bool:
        """Whether the weights are scored: once for the first mask, or again and again."""
        return self.load is None or self.schedule == "periodic"

    @property
    def needs_original(self) -> bool:
        """Whether the weights are looked at as they were before they were put into few bits."""
        return self.start == "exact" or (self.is_scored and self.salience == "quant_error")

    @property
    def has_entry_steps(self) -> bool:
        """Whether entries differ in how often they stepped, so that each has its own count."""
        return self.schedule != "static" or self.layer_gate != "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights are scored by a metric that is computed from rows."""
        return self.is_scored and self.salience in NEEDS_DATA


def mask_file(path: str | Path, where: str | None = None) -> Path:
    """The file of a saved mask: `path` itself or, if that is a folder, the mask.safetensors in it.

    Raises UserError with `where`, which says who named it.
    """
    file = Path(path) / MASK_FILE if os.path.isdir(path) else Path(path)
    fix = f"name a {MASK_FILE} or its folder; `speft score RECIPE` writes one"
    if file.is_file() and file.suffix != ".safetensors":
        raise UserError(f"the mask file {file} is not a .safetensors file", where, fix)
    if not file.is_file():
        raise UserError(f"no mask file {file}", where, fix)
    return file
