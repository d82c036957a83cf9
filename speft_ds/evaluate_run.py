"""Scoring a finished run, or any model with or without an adapter, on the sharded engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from speft_ds import distributed, lifeline
from speft_ds.adapter.apply import another_base, check_weights, with_delta
from speft_ds.adapter.format import Adapter
from speft_ds.base import Base
from speft_ds.engine import full_shape, own_elements, own_range, release
from speft_ds.errors import UserError
from speft_ds.evaluation.evaluation import Evaluation, Scored
from speft_ds.evaluation.rounds import Round
from speft_ds.evaluation.scores import main_scores, write_scores
from speft_ds.mask import read_mask
from speft_ds.metrics import Timings, say
from speft_ds.preflight import mask_file
from speft_ds.recipe import without_training
from speft_ds.schema import Eval, Recipe


@torch.no_grad()
def apply_to_shards(base: Base, folder: Path) -> None:
    """Turn the loaded, sharded base into the trained model, each rank its own shards.

    Raises:
        UserError: the adapter is damaged, or of another base.
    """
    adapter = Adapter.open(folder)
    dtype = adapter.facts["dtype"]
    if dtype != base.recipe.model.dtype:
        what = f"the adapter was trained on {dtype} weights, not {base.recipe.model.dtype}"
        raise UserError(what, str(folder), f"model.dtype={dtype}")
    if base.fingerprint != adapter.facts["fingerprint"]:
        raise another_base(adapter)
    weights = dict(base.engine.module.named_parameters())
    check_weights(adapter, {name: tuple(full_shape(weight)) for name, weight in weights.items()})
    release([weights[name] for name in adapter.names])
    for name in adapter.names:
        index, delta = adapter.entries(name)
        start, stop = own_range(weights[name])
        first, last = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
        shard, _ = own_elements(weights[name])
        where = (index[first:last] - start).to(shard.device)
        shard[where] = with_delta(shard[where], delta[first:last])


def rounds_to_score(recipe: Eval, model: str) -> list[Round]:
    """The tasks, in all prompt formats that the recipe asks for; `model` (base, tuned) begins their names."""
    shots = "" if recipe.num_fewshot is None else f"-{recipe.num_fewshot}shot"
    limit = f"-limit{recipe.limit}" if recipe.limit else ""
    label = f"{model}-{'+'.join(recipe.tasks)[:150]}{shots}{limit}".replace("/", "_")
    first = Round(label, "extra", tuple(recipe.tasks), recipe.num_fewshot, recipe.limit)
    numbers = range(1, recipe.format_spread)
    more = [
        Round(f"{label}-format-{i}", "extra", first.tasks, first.num_fewshot, first.limit, i) for i in numbers
    ]
    return [first, *more]


def run(recipe: Recipe, adapter: Path | None) -> None:
    """The whole job, on every rank.

    Args:
        recipe: the base, the tasks, and where the scores go.
        adapter: its folder; None: the base as it is.
    Raises:
        UserError: anything that the user can mend; the same on every rank.
    """
    distributed.init(recipe.train.timeout_minutes + 1)
    distributed.connect_lifeline(recipe.train.timeout_minutes, lambda: "start it again")
    base = Base(without_training(recipe, distributed.world_size()), Timings())
    evaluation = Evaluation(recipe, base.tokenizer)
    base.load(read_mask(mask_file(recipe.mask.load))[0] if recipe.mask.load else None)
    if adapter is not None:
        apply_to_shards(base, adapter)
    folder = Path(recipe.output_dir) / "eval"
    rounds = rounds_to_score(recipe.eval, "tuned" if adapter else "base")
    facts = None if adapter else base.own_facts()
    for scored in evaluation.run(base.engine.module, rounds, facts):
        distributed.on_rank_0(partial(_keep, folder, scored, recipe.eval.samples))
    distributed.barrier()
    lifeline.close()


def _keep(folder: Path, scored: Scored, with_samples: bool) -> None:
    write_scores(folder, scored.document, scored.samples if with_samples else None)
    for score in main_scores(scored.document):
        say(f"{score.name}: {score.text}, {score.num_documents} documents")
    say(str(folder / f"{scored.document['label']}.json"))
