"""The schedule of a recipe."""

from __future__ import annotations

from collections.abc import Callable

from speft_ds.config.method_config import SAMPLED
from speft_ds.sparse.mask import Mask
from speft_ds.training.growth import AccumulatedGradient, RowColumnMomentum
from speft_ds.training.schedule import GradTopk, Periodic, SampledWeights, Schedule
from speft_ds.training.setup import TrainContext

# mask.schedule, or mask.growth of `drop_grow` -> its class.
SCHEDULES: dict[str, type[Schedule]] = {
    "static": Schedule,
    "periodic": Periodic,
    "grad_topk": GradTopk,
    "sft_ag": AccumulatedGradient,
    "sft_ma": RowColumnMomentum,
}


def make_schedule(
    context: TrainContext, mask: Mask, num_steps: int, choose: Callable[[int], Mask]
) -> Schedule:
    """The schedule that the recipe asks for; arguments as for `Schedule`."""
    section, method = context.recipe.mask, context.recipe.method
    if method.name in SAMPLED:
        return SampledWeights(context, mask, num_steps, choose)
    kind = section.growth if section.schedule == "drop_grow" else section.schedule
    return SCHEDULES[kind](context, mask, num_steps, choose)
