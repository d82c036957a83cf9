"""Scoring a finished run: its base with its adapter, on the sharded engine."""

from __future__ import annotations

from pathlib import Path

import torch

from speft_ds import distributed, lifeline
from speft_ds.adapter import read_adapter
from speft_ds.base import Base
from speft_ds.engine import own_elements, own_range, release
from speft_ds.errors import UserError
from speft_ds.files import write_json
from speft_ds.mask import read_mask
from speft_ds.metrics import Timings, say
from speft_ds.preflight import mask_file
from speft_ds.recipe import without_training
from speft_ds.report import scores_of
from speft_ds.schema import Recipe


@torch.no_grad()
def apply_to_shards(base: Base, folder: Path) -> None:
    """Turn the loaded, sharded base into the trained model, each rank its own shards. Raises UserError."""
    tensors, facts = read_adapter(folder)
    if facts["fingerprint"] != base.fingerprint or facts["dtype"] != base.recipe.model.dtype:
        what = "the adapter was trained on another base, or in another dtype"
        raise UserError(what, str(folder), f"evaluate {facts['base']} in {facts['dtype']}")
    weights = dict(base.engine.module.named_parameters())
    release([weights[key.removesuffix(".index")] for key in tensors if key.endswith(".index")])
    for key in [key for key in tensors if key.endswith(".index")]:
        name = key.removesuffix(".index")
        weight, index = weights[name], tensors[key].to(torch.int64)
        if int(index[-1]) >= weight.ds_numel or int(index[0]) < 0:
            raise UserError(f"{name}: indices out of range", str(folder))
        start, stop = own_range(weight)
        first, last = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
        shard, _ = own_elements(weight)
        where = (index[first:last] - start).to(shard.device)
        delta = tensors[f"{name}.delta"][first:last].to(shard.device)
        shard[where] = (shard[where].float() + delta).to(shard.dtype)


def run(recipe: Recipe) -> None:
    """The whole job, on every rank.

    Args:
        recipe: the run's own, with the tasks to score.
    Raises:
        UserError: anything that the user can mend; the same on every rank.
    """
    from speft_ds.evaluate import evaluate, find_tasks

    distributed.init(recipe.train.timeout_minutes + 1)
    folder, section = Path(recipe.output_dir), recipe.eval
    distributed.connect_lifeline(recipe.train.timeout_minutes, lambda: "start it again")
    manager = find_tasks(section)
    base = Base(without_training(recipe, distributed.world_size()), Timings())
    base.load(read_mask(mask_file(recipe.mask.load))[0] if recipe.mask.load else None)
    apply_to_shards(base, folder / "adapter")
    say(f"evaluating {', '.join(section.tasks)} on {distributed.world_size()} rank(s)")
    results = evaluate(base.engine.module, base.tokenizer, section, manager, recipe.seed)
    limit = f"-limit{section.limit}" if section.limit else ""
    path = folder / "eval" / f"{'+'.join(section.tasks)[:200]}{limit}.json"

    def finish() -> None:
        write_json(path, {key: value for key, value in results.items() if key != "samples"})
        for what, value in scores_of(results):
            say(f"{what}: {value}")
        say(str(path))

    distributed.on_rank_0(finish)
    distributed.barrier()
    lifeline.close()
