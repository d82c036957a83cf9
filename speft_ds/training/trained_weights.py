"""Which weights are trained: the targets of a mask, whole weights; and which of them a backward reaches."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.model.kinds.target import Target
from speft_ds.model.low_rank import LowRank
from speft_ds.model.new_tokens import NewTokens
from speft_ds.model.reach import Reach, find_reach
from speft_ds.model.targets import (
    all_weights,
    find_targets,
    find_whole,
    shorten,
    target_shapes,
    tied_targets,
)
from speft_ds.selection.units import in_units
from speft_ds.sparse.mask import Mask
from speft_ds.training.run_data import classifies
from speft_ds.zero.engine import SparseEngine


def find_trained(
    model: nn.Module, loaded: Mask | None, new: NewTokens, recipe: Recipe
) -> tuple[dict[str, Target], dict[str, Target]]:
    """The targets of the mask, and what is trained whole.

    Raises:
        UserError: see `_find_targets` and `_find_whole`; or one of them has rows of new tokens.
    """
    targets = _find_targets(model, loaded, recipe) if recipe.method.has_mask else {}
    whole = _find_whole(model, targets, recipe)
    if both := [name for name in new.targets if name in targets | whole]:
        what = f"{both[0]} is to be trained by the mask or whole, and rows of it are by model.add_tokens"
        raise UserError(what, recipe.where("model.add_tokens"), "leave it out of mask.targets and mask.dense")
    return targets, whole


def _find_targets(model: nn.Module, loaded: Mask | None, recipe: Recipe) -> dict[str, Target]:
    """The weights that a loaded mask is of, or else that the recipe names.

    Raises:
        UserError: the mask is of another model, or a target shares its weight with another module.
    """
    if loaded is None:
        targets = find_targets(model, recipe.mask.targets, recipe.mask.layers)
        if recipe.mask.of_units:
            targets = in_units(model, targets, recipe.mask.granularity)
    else:
        weights = all_weights(model)
        targets = {name: weights[name] for name in loaded.shape if name in weights}
        shapes = target_shapes(targets)
        if odd := [name for name in loaded.shape if shapes.get(name) != loaded.shape[name]]:
            raise UserError(
                f"the mask is for another model: {odd[0]} is not a linear weight of "
                f"{recipe.model.name_or_path}, or has another shape",
                where=f"mask.load: {recipe.mask.load}",
                fix="train the model that the mask was scored on, or score this one: speft score",
            )
    if tied := tied_targets(model, targets):
        what = f"{', '.join(tied)} shares its weight with another module (tied embeddings)"
        raise UserError(what, "mask.targets", "target layers of the decoder only, or name it in mask.dense")
    return targets


def _find_whole(model: nn.Module, targets: dict[str, Target], recipe: Recipe) -> dict[str, Target]:
    """The weights that the method or `mask.dense` trains whole, in model order.

    Raises:
        UserError: see `find_whole`; one of them is a target, too, that the recipe names.
    """
    if recipe.method.trains_all:
        return find_whole(model, None)
    if recipe.mask.dense is None:
        return {}
    whole = find_whole(model, recipe.mask.dense)
    both = [name for name in whole if name in targets]
    if both and recipe.mask.targets is None and recipe.mask.load is None:
        for name in both:  # the default is what is left
            del targets[name]
    elif both:
        what = f"{both[0]} is trained whole, and it is a target of the mask"
        raise UserError(what, recipe.where("mask.dense"), "name it in mask.dense or in mask.targets alone")
    return whole


def keep_reached(
    engine: SparseEngine,
    targets: dict[str, Target],
    whole: dict[str, Target],
    loaded: Mask | None,
    recipe: Recipe,
    low_rank: LowRank | None = None,
) -> tuple[dict[str, Target], dict[str, Target], Reach]:
    """The targets and whole weights that a backward feeds, and the reach; rank 0 says how far they reach.

    Raises:
        UserError: none is, or a loaded mask has entries in one that is not; or the model is not causal, or
            does not run.
    """
    try:
        reach = find_reach(engine.module, targets | whole, engine.after_plain_backward)
    except Exception as error:  # any type: the code of hundreds of families runs
        what = f"{type(engine.module).__name__} fails on a row of text: {type(error).__name__}: {error}"
        fix = "a family that docs/models.md lists as trained"
        raise UserError(what, recipe.where("model.name_or_path"), fix) from error
    engine.forget_trace()
    if reach.looks_ahead and not classifies(recipe):
        raise UserError(
            f"{type(engine.module).__name__} is not causal: a prediction depends on the tokens after it",
            recipe.where("model.name_or_path"),
            "a decoder model; or is_decoder: true in its config.json, where it can be one",
        )
    kept = {name: target for name, target in targets.items() if name in reach.fed}
    fed = {name: target for name, target in whole.items() if name in reach.fed}
    starved = [name for name in targets | whole if name not in kept | fed]
    masked = [
        name for name in starved if loaded is not None and name in targets and loaded.index[name].numel()
    ]
    if masked:
        what = (
            f"the mask has entries in {masked[0]}, which this model's forward does not use as a linear layer"
        )
        raise UserError(what, f"mask.load: {recipe.mask.load}", "choose another mask: speft score RECIPE")
    if starved and not kept | fed:
        what = f"none of the targets takes part in a text forward: {starved[0]} and so on"
        key = "mask.targets" if recipe.method.has_mask else "method.targets"
        raise UserError(what, recipe.where(key), f"{key}=null")
    are_chosen = bool(loaded or recipe.mask.targets or recipe.mask.layers or recipe.mask.of_units)
    added = low_rank.targets if low_rank else {}
    _tell_reach(reach, kept | fed, starved, added, loaded is None, are_chosen)
    return targets if loaded is not None else kept, fed, reach


def _tell_reach(
    reach: Reach,
    fed: dict[str, Target],
    starved: list[str],
    added: dict[str, Target],
    is_new: bool,
    are_chosen: bool,
) -> None:
    """Say how far training reaches; `added`: low-rank matrices, which are no part of the base."""
    if bypassed := [name for name in starved if name in added]:
        log_rank0(f"note: not trained, as the linears beside them are not used alone: {shorten(bypassed)}")
    of_base = {name: target for name, target in fed.items() if name not in added}
    if of_base:
        own = replace(reach, elements={n: size for n, size in reach.elements.items() if n not in added})
        left = [name for name in starved if is_new and name not in added]
        for line in own.lines(of_base, left, are_chosen):
            log_rank0(line)
