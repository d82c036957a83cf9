"""Scoring a finished run, or any model with or without an adapter, on the sharded engine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from speft_ds import distributed, lifeline
from speft_ds.adapter.apply import another_base, check_weights, with_delta
from speft_ds.adapter.format import Adapter, tensors_sha256
from speft_ds.base import Base
from speft_ds.checks import check_chat_template
from speft_ds.dtype import agree_on_dtype
from speft_ds.engine import full_shape, own_elements, own_range, release
from speft_ds.errors import UserError
from speft_ds.evaluation.evaluation import Evaluation, Scored
from speft_ds.evaluation.files import has_scored, keep_scores
from speft_ds.evaluation.rounds import Round
from speft_ds.evaluation.scores import main_scores
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
    recipe = agree_on_dtype(recipe)
    base = Base(without_training(recipe, distributed.world_size()), Timings())
    check_chat_template(recipe, base)
    evaluation = Evaluation(recipe, base.tokenizer)
    base.load(read_mask(mask_file(recipe.mask.load))[0] if recipe.mask.load else None)
    if adapter is not None:
        apply_to_shards(base, adapter)
    folder = Path(recipe.output_dir) / "eval"
    rounds = rounds_to_score(recipe.eval, _name_of(adapter))
    of = base.scored_model(tensors_sha256(adapter))
    rounds = distributed.broadcast_object([_with_free_label(folder, round, of, recipe) for round in rounds])
    for scored in evaluation.run(base.engine.module, rounds, of):
        distributed.on_rank_0(partial(_keep, folder, scored, recipe.eval))
    distributed.barrier()
    lifeline.close()


def _name_of(adapter: Path | None) -> str:
    """What the labels of its scores begin with: `base`; `tuned`, of a run; or the adapter's own name."""
    if adapter is None:
        return "base"
    return "tuned" if adapter.name == "adapter" else adapter.resolve().name


def _with_free_label(folder: Path, round: Round, of: dict, recipe: Recipe) -> Round:
    """The round with a label that no scores of other weights or settings have."""
    number, candidate = 1, round
    while (folder / f"{candidate.label}.json").exists() and not has_scored(folder, candidate, of, recipe):
        number += 1
        candidate = replace(round, label=f"{round.label}-{number}")
    return candidate


def _keep(folder: Path, scored: Scored, recipe: Eval) -> None:
    keep_scores(folder, scored, recipe)
    for score in main_scores(scored.document):
        say(f"{score.name}: {score.text}, {score.num_documents} documents")
    say(str(folder / f"{scored.document['label']}.json"))
