"""Scoring a finished run, or any model with or without an adapter, on the sharded engine."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from speft_ds.adapter.apply import another_base, check_format, check_weights, with_delta
from speft_ds.adapter.format import Adapter, tensors_sha256
from speft_ds.comm import collectives, watchdog
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.mask_config import MaskConfig
from speft_ds.config.method_config import MethodConfig
from speft_ds.config.recipe import Recipe
from speft_ds.env import log_rank0
from speft_ds.errors import UserError
from speft_ds.evaluation.eval_jobs import EvalJob, LowBits, extra_jobs
from speft_ds.evaluation.low_bits import round_weights
from speft_ds.evaluation.results import Scored, has_scored, keep_scores
from speft_ds.evaluation.runner import EvalRunner
from speft_ds.evaluation.scores import Score, read_evaluations
from speft_ds.model.dtype import agree_on_dtype
from speft_ds.model.targets import all_weights
from speft_ds.report.tables import plain, print_table
from speft_ds.terminal import Console
from speft_ds.training.checks import check_chat_template
from speft_ds.training.model_facts import scored_model_facts
from speft_ds.training.run_data import RunData, agree_on_date, load_data
from speft_ds.training.setup import TrainContext, load_context
from speft_ds.zero.shards import changing_shards, full_shape, gathered, own_elements


@torch.no_grad()
def apply_to_shards(context: TrainContext, folder: Path) -> None:
    """Turn the loaded, sharded base into the trained model, each rank its own shards.

    Raises:
        UserError: the adapter is damaged, or of another base.
    """
    adapter = Adapter.open(folder)
    dtype = adapter.facts["dtype"]
    if dtype != context.recipe.model.dtype:
        what = f"the adapter was trained on {dtype} weights, not {context.recipe.model.dtype}"
        raise UserError(what, str(folder), f"model.dtype={dtype}")
    if context.fingerprint != adapter.facts["fingerprint"]:
        raise another_base(adapter)
    check_format(adapter, context.recipe.model.base_format)
    if (adapter.facts.get("new_tokens") or []) != (context.recipe.model.add_tokens or []):
        fix = f"model.add_tokens={json.dumps(adapter.facts.get('new_tokens'))}"
        raise UserError("the adapter has other new tokens", str(folder), fix)
    weights = all_weights(context.engine.module) | context.new_tokens.targets
    parameters = dict(context.engine.module.named_parameters())
    shapes = {name: tuple(full_shape(weight)) for name, weight in parameters.items()}
    # Of experts the shapes of the stacks; a linear in few bits is no parameter.
    check_weights(adapter, {name: target.shape for name, target in weights.items()} | shapes)
    written = [weight for name in adapter.names for weight in weights[name].written]
    with changing_shards(written + [parameters[name] for name in adapter.whole]):
        for name in adapter.whole:
            own, start = own_elements(parameters[name])
            own.copy_(adapter.value(name).view(-1)[start : start + own.numel()])
        for name in adapter.names:
            index, delta = adapter.entries(name)
            target, storage = weights[name], context.storage(name, weights[name])
            start, stop = target.own_range
            first, last = torch.searchsorted(index, torch.tensor([start, stop])).tolist()
            own = (index[first:last] - start).to(storage.device)
            pretrained = storage.pretrained(own)
            storage.set_entries(index)
            storage.write(own, with_delta(pretrained, delta[first:last]))
    for name in adapter.low_rank.shape if adapter.low_rank else ():
        target = weights[name]
        with gathered(target.weight):
            trained = adapter.low_rank.merged(name, target.weight.data).view(-1)
        start, stop = target.own_range
        with changing_shards(target.written):
            target.own_values().copy_(trained[start:stop])


def load_scored(recipe: Recipe, data: RunData, adapter: Path | None) -> TrainContext:
    """The model to score, sharded: the base, and what an adapter's folder has of it.

    Raises:
        UserError: see `load_context` and `apply_to_shards`.
    """
    # Nothing is chosen or trained: the adapter says what changed.
    recipe = recipe.model_copy(update={"mask": MaskConfig(), "method": MethodConfig()})
    context = load_context(recipe, data, trains=False)
    if adapter is not None:
        apply_to_shards(context, adapter)
    return context


def run(recipe: Recipe, adapter: Path | None, low_bits: LowBits) -> None:
    """The job, on every rank.

    Args:
        recipe: the base, the tasks, and where the scores go.
        adapter: its folder; None: the base as it is.
        low_bits: the formats to score it in.
    Raises:
        UserError: anything that the user can fix; the same on every rank.
    """
    collectives.init(recipe.train.timeout_minutes + 1)
    collectives.start_watchdog(recipe.train.timeout_minutes, lambda: "start it again")
    recipe = agree_on_date(agree_on_dtype(recipe))
    data = load_data(recipe)
    check_chat_template(recipe.eval, data.tokenizer)
    jobs = extra_jobs(recipe.eval, adapter, low_bits)
    evaluation = EvalRunner(recipe, jobs, low_bits)
    evaluation.prepare(data.tokenizer)
    context = load_scored(recipe, data, adapter)
    if low_bits.weights:
        round_weights(context.engine.module, low_bits.weights)
    folder = Path(recipe.output_dir) / "eval"
    of = scored_model_facts(context, tensors_sha256(adapter)) | low_bits.facts
    jobs = [_with_free_label(folder, job, of, recipe) for job in jobs]
    evaluation.jobs = collectives.broadcast_object(jobs)
    for scored in evaluation.run(context.engine.module, evaluation.jobs, of):
        collectives.run_on_rank0(partial(_keep, folder, scored, recipe.eval))
    collectives.barrier()
    watchdog.close()


def _with_free_label(folder: Path, job: EvalJob, of: dict, recipe: Recipe) -> EvalJob:
    """The job with a label that no scores of other weights or settings have."""
    number, candidate = 1, job
    while (folder / f"{candidate.label}.json").exists() and not has_scored(folder, candidate, of, recipe):
        number += 1
        candidate = replace(job, label=f"{job.label}-{number}")
    return candidate


def _keep(folder: Path, scored: Scored, recipe: EvalConfig) -> None:
    """Write the scores and print them, beside those of the run's own two evaluations where it has any."""
    keep_scores(folder, scored, recipe)
    found = read_evaluations(folder.parent)
    own = {"before training": found.before, "after training": found.after}
    own = {name: file for name, file in own.items() if file is not None}
    settings = scored.file.settings
    bits = {"weights": settings.weights, "activations": settings.activations}
    now = ", ".join(["now", *(f"{what} in {name}" for what, name in bits.items() if name)])
    table = Table("task, metric", now, *own, box=SIMPLE_HEAD)
    for score in scored.file.main_scores("task") + scored.file.main_scores("forgetting"):
        beside = (file.score(score.key) for file in own.values())
        table.add_row(
            plain(score.name), *("-" if each is None else _in_full(each) for each in (score, *beside))
        )
    if (new := scored.file.perplexity) is not None:
        texts = (
            f"{each.token_perplexity:.4g}" if each and each.is_of_same_text(new) else "-"
            for each in (file.perplexity for file in (scored.file, *own.values()))
        )
        table.add_row("text, token perplexity", *texts)
    console = Console()
    console.print(table) if console.is_terminal else print_table(table)  # a log has lines of any width
    log_rank0(str(folder / f"{scored.file.label}.json"))


def _in_full(score: Score) -> str:
    documents = "" if score.num_documents is None else f", {score.num_documents:,} documents"
    return f"{score}{documents}" + (f", {score.num_fewshot}-shot" if score.num_fewshot else "")
