"""What runs on every rank, of scoring. Each function is one check, called through the `ranks` fixture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from distributed.reference import make_trainer, plain_model
from speft_ds.comm import collectives, signals
from speft_ds.config.recipe import Recipe
from speft_ds.evaluation import runner
from speft_ds.evaluation.eval_jobs import jobs_of
from speft_ds.evaluation.lm import EngineLM, shard_batches

EXCHANGES = ("all_reduce", "all_gather_object", "broadcast_object_list")


def scores_and_answers(results: dict) -> dict:
    """lm-eval's scores, and each document's prompts and answers, by task."""
    samples = {
        task: [(sample["doc_id"], sample["arguments"], sample["resps"]) for sample in rows]
        for task, rows in results["samples"].items()
    }
    return {"results": results["results"], "samples": samples}


def check_evaluation(recipe: Recipe, of: dict | None = None) -> list[dict] | None:
    """lm-eval on the live engine: each job of `before`, with its documents; on rank 0."""
    trainer, copies, copy = make_trainer(recipe), [], runner.plain_copy
    runner.plain_copy = lambda module: copies.append(copy(module)) or copies[-1]
    try:
        jobs = jobs_of(recipe.eval, "before")
        scored = list(trainer.evaluation.run(trainer.engine.module, jobs, of or {}))
    finally:
        runner.plain_copy = copy
    has_all = recipe.eval.mode == "auto" and collectives.world_size() == 1
    assert not (copies and has_all), "a single rank copied its weights"
    if collectives.rank() != 0:
        return None
    return [{**scores_and_answers(each.results), "document": each.file.model_dump()} for each in scored]


def count_exchanges(num_batches: int, stops_before: int | None = None) -> dict[str, int]:
    """Collective -> how often this rank called it to score batches of two, with nothing else in them.

    Args:
        stops_before: the batch before which rank 1 is asked to stop.
    """
    requests = list(enumerate("abcdefghij" * num_batches))[: 2 * num_batches]
    batches = [requests[start : start + 2] for start in range(0, len(requests), 2)]
    calls, originals, seen = Counter(), {name: getattr(dist, name) for name in EXCHANGES}, []

    def counted(name: str):
        return lambda *args, **kwargs: calls.update([name]) or originals[name](*args, **kwargs)

    def compute(batch: list[str]) -> list[str]:
        seen.append(batch)
        if stops_before is not None and 2 * len(seen) >= stops_before and collectives.rank() == 1:
            signals.request_stop("a test")
        return [letter.upper() for letter in batch]

    for name in EXCHANGES:
        setattr(dist, name, counted(name))
    try:
        responses = shard_batches(compute, batches, needs_fillers=False)
        assert responses == [letter.upper() for _, letter in requests]
    except signals.Stopped as stopped:
        assert str(stopped) == "a test"
        calls["stopped after"] = len(seen)
    finally:
        signals._reasons.clear()
        for name, original in originals.items():
            setattr(dist, name, original)
    return dict(calls)


def check_perplexity(recipe: Recipe) -> tuple[float, float] | None:
    """The perplexity of the text, and that of plain transformers with float32 from the logits on."""
    trainer = make_trainer(recipe)
    (scored,) = trainer.evaluation.run(trainer.engine.module, jobs_of(recipe.eval, "before"), {})
    if collectives.rank() != 0:
        return None
    model = plain_model(recipe).to(collectives.device())
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    tokens = tokenizer(Path(recipe.eval.forgetting_text).read_text(), return_tensors="pt")["input_ids"][0]
    tokens = torch.cat([torch.tensor([tokenizer.bos_token_id]), tokens]).to(collectives.device())
    with torch.no_grad():
        logits = model(input_ids=tokens[None, :-1]).logits[0].to(torch.float32)
    loss = torch.nn.functional.cross_entropy(logits, tokens[1:])
    return scored.file.perplexity.token_perplexity, loss.exp().item()


def check_stock_evaluation(recipe: Recipe, num_fewshot: int | None = None) -> dict | None:
    """The same tasks by lm-eval's own HFLM on the plain model: the reference for `check_evaluation`."""
    if collectives.rank() != 0:
        return None
    return stock_scores(plain_model(recipe).to(collectives.device()), recipe, num_fewshot)


def stock_scores(model: torch.nn.Module, recipe: Recipe, num_fewshot: int | None = None) -> dict:
    """A recipe's tasks by lm-eval's own HFLM on a plain model."""
    section = recipe.eval
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=section.batch_size),
        tasks=list(section.tasks),
        limit=section.limit,
        num_fewshot=num_fewshot,
        apply_chat_template=section.chat_template,
        task_manager=TaskManager(include_path=section.include_path, include_defaults=False),
    )
    return scores_and_answers(results)


def check_auto_prompt(recipe: Recipe) -> dict | None:
    """The job of a searched prompt, and what the model was asked, call by call; on rank 0.

    `opened`: by how many calls had been made each time that a task opened its test documents.
    """
    trainer, asked, opened = make_trainer(recipe), [], []
    cached, test_docs = EngineLM.cached, ConfigurableTask.test_docs
    EngineLM.cached = lambda lm, method, requests, compute: (
        asked.append(requests) or cached(lm, method, requests, compute)
    )
    ConfigurableTask.test_docs = lambda task: opened.append(len(asked)) or test_docs(task)
    try:
        jobs = [job for job in jobs_of(recipe.eval, "before") if job.kind == "auto"]
        (scored,) = trainer.evaluation.run(trainer.engine.module, jobs, {})
    finally:
        EngineLM.cached, ConfigurableTask.test_docs = cached, test_docs
    if collectives.rank() != 0:
        return None
    document = scored.file.model_dump()
    return {**scores_and_answers(scored.results), "document": document, "asked": asked, "opened": opened}
