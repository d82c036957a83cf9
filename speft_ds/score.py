"""`speft score`: score the weights, select a mask, write it and show it. Nothing is trained.

Leaves `mask.safetensors` (see `mask.py`), `mask.png`, `score.json` and `recipe.yaml` in the run folder.
"""

from __future__ import annotations

from pathlib import Path

from speft_ds import distributed, peak_memory
from speft_ds.base import Base
from speft_ds.dtype import agree_on_dtype
from speft_ds.files import write_json
from speft_ds.machine import machine, versions
from speft_ds.mask import save_mask
from speft_ds.metrics import Timings, say
from speft_ds.model import fingerprint
from speft_ds.plots import mask_heat_map
from speft_ds.recipe import without_training
from speft_ds.run_folder import check_output_dir, start_folder
from speft_ds.schema import MASK_FILE, Recipe
from speft_ds.tables import print_mask_table


def run(recipe: Recipe) -> None:
    """The whole job, on every rank. Rank 0 writes the folder and prints the table.

    Raises:
        UserError: anything that the user can mend; the same on every rank.
        RuntimeError: the weights are not what they were before.
    """
    distributed.init()
    distributed.on_rank_0(lambda: check_output_dir(recipe))
    recipe = agree_on_dtype(recipe)
    timings = Timings()
    with timings.stage("data"):
        base = Base(without_training(recipe, distributed.world_size()), timings)
        base.read_calibration_rows(None)
    with timings.stage("model"):
        base.load()
    mask = base.choose_mask()
    with timings.stage("check"):
        if fingerprint(base.engine.module) != base.fingerprint:
            raise RuntimeError(f"scoring by {recipe.mask.salience} changed the weights")
    facts = {
        "salience": recipe.mask.salience,
        "granularity": recipe.mask.granularity,
        "budget": recipe.mask.budget,
        **base.identity(),
        "world_size": distributed.world_size(),
        "versions": versions(),
        "machine": machine(),
    }
    folder = Path(recipe.output_dir)

    def write() -> None:
        start_folder(recipe)
        save_mask(folder / MASK_FILE, mask, facts)
        mask_heat_map(folder / "mask.png", mask, f"{recipe.name}: density by {recipe.mask.salience}")
        memory = {"peak_memory_gib": peak_memory.peak_gib()}
        write_json(folder / "score.json", {**facts, "mask": mask.facts(), "timings_s": timings, **memory})
        print_mask_table(mask)

    distributed.on_rank_0(write)
    say(
        f"{mask.num_trainable:,} of {mask.num_target_elements:,} entries (density {mask.density:.4%}) "
        f"by {recipe.mask.salience}, sha256 {mask.sha256[:12]}; base unchanged, {base.fingerprint[:12]}"
    )
    say(f"salience {timings['salience']:.2f} s, selection {timings['selection']:.2f} s")
    say(f"{folder / MASK_FILE}: train it with mask.load={folder / MASK_FILE}")
    distributed.barrier()
