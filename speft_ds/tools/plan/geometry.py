"""The geometry of a model, from its configuration alone: weights by name, targets, entries to train.

Imports torch and transformers late.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from speft_ds import hub
from speft_ds.config.check_model import ATTENTION_PACKAGES, read_config
from speft_ds.config.mask_config import mask_file
from speft_ds.config.model_config import HEAD
from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError, shell

GEOMETRIES_DIR = Path(__file__).resolve().parent / "geometries"


@dataclass(frozen=True, eq=False)
class Geometry:
    """A model without its weights. Two geometries are equal if they are one: runs are cached by geometry."""

    config: object  # of `transformers`
    source: str  # where it came from, in words
    task: str
    dtype: str  # as in a recipe; `auto` is planned as bfloat16
    numel: dict[str, int]  # elements of every weight, by name; tied ones once
    targets: dict[str, tuple[int, int]]  # (out, in) of the weights that the mask chooses from, by name
    entries: dict[str, int]  # of the mask, in every target: as loaded, or by its size
    whole: tuple[str, ...]  # names of the weights that are trained whole, at some time or other
    reach: list[str]  # what to say of how far training reaches, see `Reach.lines`

    @property
    def num_entries(self) -> int:
        """Of the mask."""
        return sum(self.entries.values())

    @cached_property
    def plain_linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the weights that `model.base_format` would store in few bits.

        Raises:
            UserError: there are none.
        """
        import torch

        from speft_ds.model.quantise import plain_linears
        from speft_ds.model.targets import all_weights

        with torch.device("meta"):
            model = build_model(self.config, self.task, self.dtype)
        weights = all_weights(model)
        return {name: weights[name].shape for name in plain_linears(model)[0]}

    @property
    def num_weights(self) -> int:
        return sum(self.numel.values())

    @property
    def num_target_elements(self) -> int:
        return sum(self.numel[name] for name in self.targets)

    @property
    def density(self) -> float:
        """Fraction of the targeted weights that is trained."""
        return self.num_entries / max(1, self.num_target_elements)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the weights of which something is trained."""
        return frozenset([*self.targets, *self.whole])

    @property
    def largest_target(self) -> int:
        """Elements of the largest targeted weight."""
        return max((self.numel[name] for name in self.targets), default=0)


def read_geometry(recipe: Recipe) -> Geometry:
    """The geometry of a recipe's model. Never asks the network.

    Raises:
        UserError: no configuration is cached; targets that the model does not have; too many or few entries.
    """
    import torch

    from speft_ds.model.low_rank import matrix_sizes, num_elements
    from speft_ds.model.targets import all_weights, find_targets, find_whole, target_shapes
    from speft_ds.selection.topk import budget_counts
    from speft_ds.selection.units import find_units, in_units, parts_of
    from speft_ds.sparse.mask import read_mask
    from speft_ds.training.low_rank import linears_beside, num_entries

    config, source = _read_config(recipe)
    if recipe.model.attention not in ("auto", "flex_attention", *ATTENTION_PACKAGES):
        config._attn_implementation = recipe.model.attention
    task, dtype = recipe.model.task, recipe.model.dtype
    dtype = "bfloat16" if dtype == "auto" else dtype
    if task != "causal_lm":
        config.num_labels = len(recipe.data.labels or ("one", "other"))
        config.pad_token_id = config.pad_token_id or 0
    with torch.device("meta"):
        model = build_model(config, task, dtype)
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    are_chosen = bool(recipe.mask.load or recipe.mask.targets or recipe.mask.layers or recipe.mask.of_units)
    patterns = None if recipe.method.trains_all else recipe.mask.dense
    whole = find_whole(model, patterns) if patterns or recipe.method.trains_all else {}
    found, mask = {}, None
    if not recipe.method.has_mask:
        targets, entries, reach = {}, {}, []
        linears, rank = linears_beside(model, found, mask, recipe)
    elif recipe.mask.load is None:
        found, units = find_targets(model, recipe.mask.targets, recipe.mask.layers), None
        found = {name: target for name, target in found.items() if name not in whole}
        if recipe.mask.of_units:
            found = in_units(model, found, recipe.mask.granularity)
        kept, reach = _keep_reached(config, task, dtype, found, are_chosen)
        if recipe.mask.of_units:
            units = find_units(model, kept, recipe.mask.granularity)
        targets = target_shapes(kept)
        linears, rank = linears_beside(model, found, mask, recipe)
        sizes = {name: rows * columns for name, (rows, columns) in targets.items()}
        total = num_entries(recipe, mask, targets, num_elements(linears, rank), parts_of(units))
        _, counts = budget_counts(sizes, "per_layer", total)
        entries = dict(zip(sizes, counts, strict=True))
    else:
        mask, _ = read_mask(mask_file(recipe.mask.load, recipe.where("mask.load")))
        found = {name: target for name, target in all_weights(model).items() if name in mask.shape}
        _, reach = _keep_reached(config, task, dtype, found, are_chosen)
        targets, entries = mask.shape, {name: index.numel() for name, index in mask.index.items()}
        linears, rank = linears_beside(model, found, mask, recipe)
    matrices = matrix_sizes(linears, rank, recipe.method.name)
    numel |= matrices
    names = (*whole, *matrices, *([HEAD] if task != "causal_lm" and HEAD in numel else []))
    return Geometry(config, source, task, dtype, numel, targets, entries, names, reach)


def _keep_reached(config, task: str, dtype: str, targets: dict, are_chosen: bool) -> tuple[dict, list[str]]:
    """The targets that a text forward reaches, and what to say of it."""
    from speft_ds.model.reach import reach_without_values

    reach = reach_without_values(lambda: build_model(config, task, dtype), list(targets))
    if reach is None:
        return targets, ["note: how far training reaches in this model, a run will tell"]
    kept = {name: target for name, target in targets.items() if name in reach.fed}
    return kept, reach.lines(kept, [name for name in targets if name not in kept], are_chosen)


def _read_config(recipe: Recipe) -> tuple[object, str]:
    """The model's configuration and where it came from, in words. Raises UserError."""
    name, where = recipe.model.name_or_path, recipe.where("model.name_or_path")
    file = config_file(name)
    if file is None:
        raise UserError(
            f"no configuration of {name} is cached: a plan needs its config.json, and downloads nothing",
            where,
            f"name a folder that has one, or fetch it: {shell('hf', 'download', name, 'config.json')}; "
            f"built in are: {', '.join(list_geometries())}",
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**read_config(file))
    except UserError:
        raise
    except Exception as error:  # any type: each family checks it in its own way
        what = f"cannot read the configuration: {type(error).__name__}: {error}"
        raise UserError(what, f"{file} ({where})", "a model of another library, or a damaged file") from error
    if file.parent == GEOMETRIES_DIR:
        return config, f"built in (geometries/{file.name})"
    return config, str(file) if os.path.isdir(name) else "the hub cache"


def config_file(name: str) -> Path | None:
    """The config.json of a model, in its folder, the hub's cache or this package; None: in none of them."""
    folder = hub.model_folder(name)
    file = folder / "config.json" if folder else GEOMETRIES_DIR / f"{name.replace('/', '--')}.json"
    return file if file.is_file() else None


def list_geometries() -> list[str]:
    """The models whose configuration comes with this package."""
    return sorted(path.stem.replace("--", "/") for path in GEOMETRIES_DIR.glob("*.json"))


def build_model(config, task: str, dtype: str):
    """A model of `transformers`, as `from_pretrained` would make it, on the device of the context.

    Raises:
        UserError: `transformers` has none for this task and configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    try:
        return auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # as above
        what = f"transformers has no {task.replace('_', ' ')} model for this configuration"
        raise UserError(f"{what}: {error}", "model.name_or_path", "choose another model") from error
