"""What run.json says of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speft_ds.comm import collectives
from speft_ds.env import machine_facts, versions

if TYPE_CHECKING:
    from speft_ds.training.trainer import Trainer


def run_facts(trainer: Trainer) -> dict:
    """The contents of run.json, but for what the end of the run adds."""
    recipe, mask = trainer.recipe, trainer.mask
    return {
        "versions": versions(),
        "machine": {"device": str(collectives.device()), **machine_facts()},
        "world_size": collectives.world_size(),
        "global_batch": recipe.train.global_batch,
        "micro_batch": recipe.train.micro_batch,
        "num_steps": trainer.num_steps,
        "mask": {
            "salience": recipe.mask.salience,
            "granularity": recipe.mask.granularity,
            "budget": recipe.mask.budget,
            "schedule": recipe.mask.schedule,
            "layer_gate": recipe.mask.layer_gate,
            "loaded_from": recipe.mask.load,
            "calibration_samples": recipe.mask.calibration_samples,
            **mask.facts(),
            "entries_by_rank": trainer.state.layout.lengths,
            "changes": trainer.schedule.changes,
        },
        "head": sum(rows * columns for rows, columns in trainer.state.heads.values()),
        "sparse_backends": sorted(set(trainer.gradient.backends.values())),
        "resources": trainer.resources,
        "base": {"name_or_path": recipe.model.name_or_path, "fingerprint": trainer.context.fingerprint},
        "timings_s": trainer.timings,
    }
