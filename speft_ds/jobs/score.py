"""`speft score`: score the weights, select a mask, write it and show it. Nothing is trained.

Leaves `mask.safetensors` (see `sparse/mask.py`), `mask.png`, `score.json` and `recipe.yaml` in the run
folder.
"""

from __future__ import annotations

from pathlib import Path

from speft_ds.comm import collectives, watchdog
from speft_ds.config.mask_config import MASK_FILE
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0, machine_facts, versions
from speft_ds.io import write_bytes, write_json
from speft_ds.model.dtype import agree_on_dtype
from speft_ds.model.fingerprint import fingerprint
from speft_ds.report.plots import mask_heat_map
from speft_ds.report.tables import print_mask_table
from speft_ds.sparse.gradient import gradient_cost
from speft_ds.sparse.kernels.measure import agree_on_costs
from speft_ds.sparse.mask import save_mask
from speft_ds.training.checks import check_shapes
from speft_ds.training.memory import peak_gib
from speft_ds.training.metrics import Timings
from speft_ds.training.model_facts import base_facts
from speft_ds.training.run_data import agree_on_date, load_data
from speft_ds.training.run_dir import check_output_dir, start_folder
from speft_ds.training.setup import choose_mask, load_context


def run(recipe: Recipe) -> None:
    """The job, on every rank. Rank 0 writes the folder and prints the table.

    Raises:
        UserError: anything that the user can fix; the same on every rank.
        RuntimeError: the weights are not what they were before.
    """
    collectives.init(recipe.train.timeout_minutes + 1)
    collectives.start_watchdog(recipe.train.timeout_minutes, lambda: "start it again")
    recipe = agree_on_date(agree_on_dtype(recipe))
    collectives.run_on_rank0(lambda: check_output_dir(recipe))
    timings = Timings(collectives.synchronize)
    with timings.stage("kernels"):
        costs = agree_on_costs(recipe)
    with timings.stage("data"):
        data = load_data(recipe, needs_calibration=True)
    with timings.stage("model"):
        context = load_context(recipe, data, trains=False)
    check_shapes(recipe.mask, context.shapes)
    # A base in few bits, or with new tokens, is another model than the one that was loaded.
    is_another = context.quantised or context.new_tokens.targets
    before = fingerprint(context.engine.module) if is_another else context.fingerprint
    mask = choose_mask(context, timings)
    with timings.stage("check"):
        if fingerprint(context.engine.module) != before:
            raise RuntimeError(f"scoring by {recipe.mask.salience} changed the weights")
    facts = {
        "salience": recipe.mask.salience,
        "granularity": recipe.mask.granularity,
        "budget": recipe.mask.budget,
        **base_facts(context),
        "world_size": collectives.world_size(),
        "versions": versions(),
        "machine": machine_facts(),
    }
    folder = Path(recipe.output_dir)
    is_told = costs is not None and collectives.rank() == 0
    cost = gradient_cost(mask, recipe, costs, context.num_stacked) if is_told else None

    def write() -> None:
        start_folder(recipe)
        save_mask(folder / MASK_FILE, mask, facts)
        title = f"{recipe.name}: density by {recipe.mask.salience}"
        write_bytes(folder / "mask.png", mask_heat_map(mask, title))
        memory = {"peak_memory_gib": peak_gib()}
        write_json(
            folder / "score.json",
            {**facts, "mask": mask.facts(), "gradient_cost": cost, "timings_s": timings, **memory},
        )
        print_mask_table(mask)

    collectives.run_on_rank0(write)
    log_rank0(
        f"{mask.num_trainable:,} of {mask.num_target_elements:,} entries (density {mask.density:.4%}) "
        f"by {recipe.mask.salience}, sha256 {mask.sha256[:12]}; base unchanged, {context.fingerprint[:12]}"
    )
    log_rank0(mask.cost_in_words())
    if cost:
        backends = ", ".join(f"{name} ({count} weights)" for name, count in cost["backends"].items())
        about = f"about {cost['over_dense']:.2f} of the dense one's time, by {backends}"
        log_rank0(f"its gradient on {cost['device']}: {about}")
    log_rank0(f"salience {timings['salience']:.2f} s, selection {timings['selection']:.2f} s")
    log_rank0(f"{folder / MASK_FILE}: train it with mask.load={folder / MASK_FILE}")
    collectives.barrier()
    watchdog.close()
