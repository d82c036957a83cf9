"""What has to hold before a run begins, and is known once the model is loaded; on every rank alike."""

from __future__ import annotations

import shutil
from pathlib import Path

from speft_ds.comm import collectives
from speft_ds.config.recipe import Recipe
from speft_ds.data.dataset import TokenizedDataset
from speft_ds.errors import UserError
from speft_ds.plan.plan import checkpoint_entry
from speft_ds.selection.topk import min_trainable
from speft_ds.sparse.mask import Mask
from speft_ds.training.checkpoint.folder import CHECKPOINTS, Checkpoint
from speft_ds.training.setup import TrainContext


def check_chat_template(recipe: Recipe, base: TrainContext) -> None:
    """Refuse tasks in a chat template that the tokenizer does not have."""
    section = recipe.eval
    if (
        (section.tasks or section.forgetting_tasks)
        and section.chat_template
        and not base.tokenizer.chat_template
    ):
        fix = "eval.chat_template=false"
        raise UserError("the tokenizer has no chat template", "eval.chat_template", fix)


def check_steps(recipe: Recipe, num_steps: int) -> None:
    """Refuse a run that is too short for its warm-up, or for its mask to change."""
    mask, warmup = recipe.mask, recipe.optimizer.warmup_steps
    if warmup > num_steps:
        what = f"more warm-up steps ({warmup}) than steps ({num_steps})"
        raise UserError(what, "optimizer.warmup_steps", f"optimizer.warmup_steps={num_steps // 10}")
    if mask.schedule in ("periodic", "drop_grow") and mask.update_every >= num_steps:
        what = (
            f"the mask would never change: it would after {mask.update_every} steps, the run has {num_steps}"
        )
        fix = f"mask.update_every={max(1, num_steps // 5)}, or mask.schedule=static"
        raise UserError(what, "mask.update_every", fix)


def check_loaded_mask(recipe: Recipe, base: TrainContext, loaded: Mask, facts: dict) -> None:
    """Refuse a loaded mask of another base, or one that cannot be chosen anew in the same size.

    Args:
        facts: that the mask was saved with.
    """
    section, where = recipe.mask, f"mask.load: {recipe.mask.load}"
    if facts.get("fingerprint_bfloat16") != base.fingerprint_bfloat16:
        raise UserError(
            "the mask was scored on another base: the weights of this model have another fingerprint",
            where=where,
            fix=f"train {facts.get('base')}, or score this model: speft score",
        )
    if loaded.num_trainable == 0:
        raise UserError("the mask has no entries: nothing to train", where, "score another: speft score")
    if section.schedule == "periodic" and (
        section.budget == "per_row" or loaded.num_trainable < min_trainable(section, base.shapes)
    ):
        raise UserError(
            f"mask.budget={section.budget} with mask.granularity={section.granularity} cannot choose "
            f"{loaded.num_trainable:,} entries anew, which the loaded mask has",
            where=where,
            fix="mask.budget=global mask.granularity=element, or mask.schedule=static",
        )


def check_same_run(
    recipe: Recipe, base: TrainContext, rows: TokenizedDataset, loaded: Mask | None, checkpoint: Checkpoint
) -> None:
    """Refuse to go on over another base, other rows or another loaded mask than the checkpoint's."""
    manifest, where = checkpoint.manifest, str(checkpoint.path)
    if manifest["base"]["fingerprint"] != base.fingerprint:
        what = "the checkpoint is of another base: the weights of this model have another fingerprint"
        raise UserError(what, where, f"train {manifest['base']['base']}, unchanged")
    if manifest["rows_sha256"] != rows.facts["sha256"]:
        what = "the training rows are not those of the checkpoint any more"
        raise UserError(what, where, f"put back the data of {recipe.where_rows()}, or start anew")
    if recipe.mask.schedule == "periodic" and manifest["calibration_sha256"] != base.calibration_sha256:
        what = "the calibration rows, which choose every mask, are not those of the checkpoint any more"
        raise UserError(what, where, f"put back {recipe.mask.calibration_path or 'the data'}, or start anew")
    if loaded is not None and manifest["state"]["first_sha256"] != loaded.sha256:
        what = f"mask.load={recipe.mask.load} is another mask than the one that the run started with"
        raise UserError(what, where, "put back the mask, or start anew")


def check_space(recipe: Recipe, base: TrainContext, num_steps: int) -> None:
    """Refuse a disk that the checkpoints will not fit on; the run folder is there."""
    train, folder = recipe.train, Path(recipe.output_dir)
    if train.checkpoint_every is None:
        return
    number = train.keep_last + 1 + (num_steps // train.keep_every if train.keep_every else 0)
    num_trained = base.num_trainable + sum(head.weight.ds_numel for head in base.heads.values())
    needed = number * checkpoint_entry(recipe) * num_trained

    def check() -> None:
        there = sum(file.stat().st_size for file in (folder / CHECKPOINTS).rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free + there  # of a run that goes on: they make room
        if needed > free:
            what = f"{number} checkpoints need {needed:,} bytes, the disk has {free:,}"
            raise UserError(what, str(folder), "free space, another output_dir, or train.keep_last=1")

    collectives.run_on_rank0(check)
