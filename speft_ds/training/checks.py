"""Checks of a run that need its rows or its model; the same on every rank."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from speft_ds.comm import collectives
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.recipe import Recipe
from speft_ds.errors import UserError
from speft_ds.model.targets import layer_number
from speft_ds.selection.topk import min_trainable
from speft_ds.selection.units import parts_of
from speft_ds.sparse.mask import Mask
from speft_ds.training.checkpoint.folder import CHECKPOINTS, Checkpoint, checkpoint_entry, num_checkpoints
from speft_ds.training.setup import TrainContext


def check_chat_template(section: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tasks in a chat template that the tokenizer does not have."""
    if (section.tasks or section.forgetting_tasks) and section.chat_template and not tokenizer.chat_template:
        fix = "eval.chat_template=false"
        raise UserError("the tokenizer has no chat template", "eval.chat_template", fix)


def check_steps(recipe: Recipe, num_steps: int) -> None:
    """Refuse a run that is too short for its warm-up, its profile, or for its mask to change."""
    mask, warmup = recipe.mask, recipe.optimizer.warmup_steps
    if warmup > num_steps:
        what = f"more warm-up steps ({warmup}) than steps ({num_steps})"
        raise UserError(what, "optimizer.warmup_steps", f"optimizer.warmup_steps={num_steps // 10}")
    profile = recipe.train.profile
    if profile is not None and profile[1] > num_steps:
        what = f"steps {profile[0]} to {profile[1]} are to be profiled, the run has {num_steps}"
        raise UserError(what, "train.profile", f"train.profile=[{min(profile[0], num_steps)},{num_steps}]")
    if mask.schedule in ("periodic", "drop_grow") and mask.update_every >= num_steps:
        what = (
            f"the mask would never change: it would after {mask.update_every} steps, the run has {num_steps}"
        )
        sooner = mask.update_every_within(num_steps)
        fix = (f"mask.update_every={sooner}, or " if sooner else "") + "mask.schedule=static"
        raise UserError(what, "mask.update_every", fix)


def check_loaded_mask(context: TrainContext, loaded: Mask, facts: dict) -> None:
    """Refuse a loaded mask of another base, or one that cannot be chosen anew in the same size.

    Args:
        facts: that the mask was saved with.
    """
    section, where = context.recipe.mask, f"mask.load: {context.recipe.mask.load}"
    if facts.get("fingerprint_bfloat16") != context.fingerprint_bfloat16:
        raise UserError(
            "the mask was scored on another base: the weights of this model have another fingerprint",
            where=where,
            fix=f"train {facts.get('base')}, or score this model: speft score",
        )
    if loaded.num_trainable == 0:
        raise UserError("the mask has no entries: nothing to train", where, "score another: speft score")
    if section.schedule == "periodic" and (
        section.budget == "per_row"
        or loaded.num_trainable < min_trainable(section, context.shapes, parts_of(context.units))
    ):
        raise UserError(
            f"mask.budget={section.budget} with mask.granularity={section.granularity} cannot choose "
            f"{loaded.num_trainable:,} entries anew, which the loaded mask has",
            where=where,
            fix="mask.budget=global mask.granularity=element, or mask.schedule=static",
        )


def check_same_run(context: TrainContext, loaded: Mask | None, checkpoint: Checkpoint) -> None:
    """Refuse to go on over another base, other rows or another loaded mask than the checkpoint's."""
    recipe, data = context.recipe, context.data
    manifest, where = checkpoint.manifest, str(checkpoint.path)
    if manifest["base"]["fingerprint"] != context.fingerprint:
        what = "the checkpoint is of another base: the weights of this model have another fingerprint"
        raise UserError(what, where, f"train {manifest['base']['base']}, unchanged")
    if manifest["rows_sha256"] != data.training.facts["sha256"]:
        what = "the training rows are not those of the checkpoint any more"
        raise UserError(what, where, f"put back the data of {recipe.where_rows()}, or start anew")
    if recipe.mask.schedule == "periodic" and manifest["calibration_sha256"] != data.calibration_sha256:
        what = "the calibration rows, which choose every mask, are not those of the checkpoint any more"
        raise UserError(what, where, f"put back {recipe.mask.calibration_path or 'the data'}, or start anew")
    if loaded is not None and manifest["state"]["first_sha256"] != loaded.sha256:
        what = f"mask.load={recipe.mask.load} is another mask than the one that the run started with"
        raise UserError(what, where, "put back the mask, or start anew")


def check_space(context: TrainContext, num_steps: int) -> None:
    """Refuse a disk that the checkpoints will not fit on; the run folder is there."""
    recipe = context.recipe
    train, folder = recipe.train, Path(recipe.output_dir)
    if train.checkpoint_every is None:
        return
    number = num_checkpoints(train, num_steps)
    num_trained = context.num_trainable + context.new_tokens.num_elements
    num_trained += sum(target.numel for target in context.whole.values())
    needed = number * checkpoint_entry(recipe) * num_trained

    def check() -> None:
        there = sum(file.stat().st_size for file in (folder / CHECKPOINTS).rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free + there  # of a run that goes on: they make room
        if needed > free:
            what = f"{number} checkpoints need {needed:,} bytes, the disk has {free:,}"
            raise UserError(what, str(folder), "free space, another output_dir, or train.keep_last=1")

    collectives.run_on_rank0(check)


def check_sampled(context: TrainContext) -> None:
    """Refuse a `lisa` that samples all layers."""
    method, layers = context.recipe.method, {layer_number(name) for name in context.whole} - {None}
    if method.name == "lisa" and method.layers >= len(layers):
        what = f"{method.layers} of {len(layers)} layers at a time are all of them"
        fix = f"method.layers={max(1, len(layers) // 4)}, or method.name=full"
        raise UserError(what, "method.layers", fix)


def check_shapes(mask: MaskConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a `mask` section that asks for more than its targets have.

    Args:
        shapes: weight name -> (out, in) of the targets.
    Raises:
        UserError: `mask.lift_rank` or `mask.gate_layers` is too large.
    """
    if not shapes:  # of a method without a mask
        return
    smallest = min(min(shape) for shape in shapes.values())
    if mask.salience == "lift" and mask.lift_rank >= smallest:
        raise UserError(
            f"an approximation of rank {mask.lift_rank} leaves a weight with {smallest} "
            "rows or columns as it is",
            where="mask.lift_rank",
            fix=f"mask.lift_rank={max(1, smallest // 2)}, or leave out small weights by mask.targets",
        )
    layers = {layer_number(name) for name in shapes} - {None}
    if mask.layer_gate in ("sampled", "importance") and mask.gate_layers >= len(layers):
        raise UserError(
            f"a gate that opens {mask.gate_layers} of {len(layers)} layers shuts nothing",
            where="mask.gate_layers",
            fix=f"mask.gate_layers={max(1, len(layers) // 4)}, or mask.layer_gate=none",
        )
